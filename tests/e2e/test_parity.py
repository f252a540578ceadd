"""vLLM in float32 against what the learner recomputes, token by token, after every sync of a run
whose optimizer steps change the weights visibly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.gaps import BOUND, gaps_of_step
from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.ranks import run_module
from tests.support.served_engine import ServedEngine

NUM_STEPS = 3  # step k samples from sync k - 1: the first from the initial weights
MIN_TOKENS = 5000


@pytest.mark.parametrize(
    ("layout", "recompute"), [("tensor", "auto"), ("pipeline", "always")], ids=["TP2", "PP2"]
)
def test_engine_and_learner_agree_after_every_sync(
    layout: str,
    recompute: str,
    tmp_path: Path,
    write_config: Callable[..., Path],
    sharp_checkpoint: Path,
    served_engine: ServedEngine,
) -> None:
    config = write_config(
        tmp_path,
        parallel={layout: 2},
        checkpoint={"every": 2, "save_hf": True, "hf_every": 2},
        loop={"num_steps": NUM_STEPS, "prompts_per_step": 8, "samples_per_prompt": 8},
    )
    run_dir = tmp_path / "run"
    train_to_the_end(
        config,
        f"learner.recompute={recompute}",
        num_ranks=2,
        run_dir=run_dir,
        engine=served_engine,
    )

    for step in range(1, NUM_STEPS + 1):
        gaps, logprobs = gaps_of_step(run_dir / "rollouts", step)
        print(
            f"{layout} step {step}: {len(gaps)} tokens, largest gap {gaps.max():.2e}, "
            f"mean -logprob {-logprobs.mean():.2f}"
        )
        assert len(gaps) >= MIN_TOKENS
        assert gaps.max() <= BOUND
        # Near-uniform probabilities would agree whatever the weights are.
        assert -logprobs.mean() < 0.7 * math.log(128)

    published = [line["published"] for line in read_jsonl(run_dir / "sync.jsonl")]
    assert len(set(published)) == NUM_STEPS + 1
    before = load_file(sharp_checkpoint / "model.safetensors")
    after = load_file(run_dir / "huggingface" / "model.safetensors")
    for name, tensor in before.items():
        # The end-of-sequence row and unused tokens may stand still; no tensor as a whole does.
        assert (after[name] - tensor).norm() > 0.005 * tensor.norm(), name
    check_hf_checkpoints(run_dir, after)


def check_hf_checkpoints(run_dir: Path, final: dict[str, torch.Tensor]) -> None:
    """The tool makes the same of a run's checkpoints as the run, on one rank and not on two."""
    for step in (2, NUM_STEPS):
        made = run_dir / f"made_{step}"
        checkpoint = run_dir / "checkpoints" / f"step_{step:06d}"
        told = run_module("tools.convert_checkpoint", checkpoint, "--output", made, ranks=0).stdout
        assert told.splitlines()[-1] == str(made)
        written = run_dir / "huggingface"
        if step < NUM_STEPS:
            written = run_dir / "huggingface_steps" / checkpoint.name
        assert sorted(path.name for path in made.iterdir()) == sorted(
            path.name for path in written.iterdir()
        )
        tensors = load_file(made / "model.safetensors")
        assert list(tensors) == list(load_file(written / "model.safetensors"))
        for name, tensor in load_file(written / "model.safetensors").items():
            assert torch.equal(tensors[name], tensor), name
        differing = [name for name in final if not torch.equal(final[name], tensors[name])]
        assert bool(differing) == (step < NUM_STEPS)
    assert [path.name for path in (run_dir / "huggingface_steps").iterdir()] == ["step_000002"]
