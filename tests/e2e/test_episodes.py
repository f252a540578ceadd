"""Episodes on the real engine: what the model said is trained on, what the tool said is masked; a
tool that hangs, raises or ends its process costs its own episodes, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.rollout.recording import read_recomputed, read_step
from tests.e2e.episode_tool import ANSWERS, HANGS, NUM_KINDS, REPLY
from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.served_engine import ServedEngine

STEPS, SAMPLES = 2, 4
VOCABULARY = 128


def test_a_run_of_episodes(
    tmp_path: Path,
    write_config: Callable[..., Path],
    served_engine: ServedEngine,
    sharp_checkpoint: Path,
) -> None:
    config = write_config(
        tmp_path,
        rollout={
            # A turn ends soon, at any of many tokens.
            "sampling": {"max_tokens": 60, "stop_token_ids": list(range(40, 80))},
            "environment": {
                "name": "tests.e2e.episode_tool:reply",
                "tool_seconds": 1.0,
                "num_workers": 2,
            },
        },
        loop={"num_steps": STEPS, "prompts_per_step": NUM_KINDS, "samples_per_prompt": SAMPLES},
    )
    run_dir = tmp_path / "run"
    output = train_to_the_end(config, num_ranks=0, run_dir=run_dir, engine=served_engine)
    lines = read_jsonl(run_dir / "metrics.jsonl")[1:]
    assert len(lines) == STEPS
    tokenizer = load_tokenizer(str(sharp_checkpoint), VOCABULARY)
    num_replies = 0
    for line in lines:
        groups = read_step(run_dir / "rollouts", line["step"])
        recomputed = read_recomputed(run_dir / "rollouts", line["step"])
        reasons = []
        for each in groups:
            kind = each.group.prompt.index % NUM_KINDS
            for number, rollout in enumerate(each.group.rollouts):
                reasons.append(rollout.finish_reason)
                if kind == ANSWERS:
                    assert rollout.finish_reason in ("stop", "length")
                elif rollout.finish_reason != "length":  # a first turn that did not end
                    assert rollout.finish_reason == ("timeout" if kind == HANGS else "crash")
                mask = np.asarray(rollout.loss_mask)
                masked = np.asarray(rollout.token_ids)[~mask][len(each.group.prompt.token_ids) :]
                said = tokenizer.decode(masked)
                assert said.replace(REPLY, "").strip() == ""
                num_replies += said.count(REPLY)
                logprobs = np.asarray(rollout.rollout_logprobs)
                assert (logprobs[~mask] == 0).all() and (logprobs[mask] < 0).all()
                of_learner = np.asarray(recomputed[each.group.prompt.index, number])
                assert (of_learner[~mask] == 0).all() and (of_learner[mask] < 0).all()
                # float32 on both sides: the learner saw the same tokens in the same places.
                assert np.abs(of_learner - logprobs)[mask].max() < 1e-3
        failed = sum(reason in ("timeout", "crash") for reason in reasons)
        assert failed > 0
        assert line["reward/failure_rate/mean"] == pytest.approx(failed / len(reasons))
        assert line["rollout/kept_rate/mean"] <= 1 - failed / len(reasons)
        assert line["learner/num_broken_updates"] == 0
    assert num_replies >= 4
    assert "ended by a timeout of its environment" in output
    assert "ended by a crash of its environment" in output
