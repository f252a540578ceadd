"""Which tokens count as sampled after an update, from rollouts written here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.errors import DataError
from megatron_rl.records import ScoredGroup
from megatron_rl.rollout.recording import write_recomputed, write_step
from tests.fakes.groups import judged, make_group, make_rollout, make_scores
from tools.stale_cache_gap import gaps_of

NUM_PROMPT = 2


def write_run(run_dir: Path, *versions: tuple[int, int, int]) -> Path:
    """Step 2 of a run: a response of three tokens for each of `versions`, of probability 0.5 to the
    engine, and 0.5, 0.75 and 1 to the learner.
    """
    whole = make_rollout(3, logprob=float(np.log(0.5)))
    rollouts = [replace(whole, weight_versions=(-1,) * NUM_PROMPT + each) for each in versions]
    group = ScoredGroup(group=make_group(0, *rollouts), scores=make_scores(*[1.0] * len(rollouts)))
    write_step(run_dir / "rollouts", 2, 0, [judged(group)], num_ranks=1)
    write_recomputed(
        run_dir / "rollouts",
        2,
        0,
        prompt_index=[0] * len(rollouts),
        sample_index=range(len(rollouts)),
        lengths=[NUM_PROMPT + 3] * len(rollouts),
        recomputed_logprobs=torch.tensor([1.0, 1.0, 0.5, 0.75, 1.0] * len(rollouts)).log(),
    )
    (run_dir / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in range(3))
    )
    return run_dir


def test_the_tokens_of_the_learners_weights_in_responses_that_began_before(tmp_path: Path) -> None:
    """In step 2 the learner has version 1."""
    after, older = gaps_of(write_run(tmp_path, (0, 0, 1), (0, 1, 1), (1, 1, 1), (0, 0, 0)))
    assert after == pytest.approx([0.5, 0.25, 0.5], abs=1e-6)
    assert older == pytest.approx([0.0, 0.25, 0.0], abs=1e-6)


def test_a_run_without_such_responses_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected responses that span an update, got none"):
        gaps_of(write_run(tmp_path, (1, 1, 1)))
