"""A replayed run whose ranks share each row reports what one rank reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.runs import read_jsonl
from tests.learner.recorded import NUM_PROMPTS, NUM_SAMPLES
from tests.support.ranks import run_module

NUM_STEPS = 2
FIGURES = ("loss/mean", "discrepancy/mean", "constraint/next_lambda", "learner/grad_norm")


@pytest.mark.slow
def test_context_parallel_run_reports_what_one_rank_reports(
    tmp_path: Path,
    write_config: Callable[..., Path],
    tiny_checkpoint: Path,
    recorded_rollouts: Path,
) -> None:
    config = write_config(
        tmp_path,
        model={"path": str(tiny_checkpoint)},
        rollout={"sampling": {"max_tokens": 32}},
        learner={"tokens_per_micro_batch": 256, "optimizer": {"learning_rate": 1e-3}},
        loop={
            "num_steps": NUM_STEPS,
            "prompts_per_step": NUM_PROMPTS,
            "samples_per_prompt": NUM_SAMPLES,
        },
    )
    steps = {}
    for ranks in (1, 2):
        run_dir = tmp_path / f"run_{ranks}"
        settings = [
            f"run_dir={run_dir}",
            f"parallel.context={ranks}",
            f"replay={recorded_rollouts}",
        ]
        run_module("megatron_rl.train", config, *settings, ranks=ranks)
        steps[ranks] = read_jsonl(run_dir / "metrics.jsonl")[1:]
        assert len(steps[ranks]) == NUM_STEPS
    for one, shared in zip(steps[1], steps[2], strict=True):
        assert one.keys() == shared.keys()
        for name in FIGURES:
            assert shared[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
