"""A mixture of experts, for real: experts divided among two ranks, weights sent to vLLM after every
step, from rank 0 or from the first rank of each pipeline stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.models import write_tiny_experts
from tests.support.short_run import write_short_run

TOLERANCE = 2e-5  # of a log-prob, relative, between learner and engine in float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "layout", "num_ranks"),
    [
        ("shared_memory", {"expert": 2}, 2),
        ("collective", {"expert": 2}, 2),
        ("collective", {"expert": 2, "pipeline": 2}, 4),
    ],
    ids=["shared_memory", "collective", "collective from two stages"],
)
def test_the_engine_agrees_after_every_sync(
    tmp_path: Path, transport: str, layout: dict[str, Any], num_ranks: int
) -> None:
    model = tmp_path / "model"
    write_tiny_experts(model, expert_width=64)
    config = write_short_run(
        tmp_path,
        model,
        {
            "parallel": layout,
            "sync": {"transport": transport},
            "rollout": {"startup_timeout_seconds": 600, "sampling": {"max_tokens": 20}},
            "learner": {"moe": {"load_balancing_coefficient": 0.001, "z_loss_coefficient": 1e-4}},
            "loop": {"num_steps": 2},
        },
    )
    train_to_the_end(config, num_ranks=num_ranks, run_dir=tmp_path / "run")
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    gaps = [line["sync/probe_relative_logprob_gap/max"] for line in lines]
    assert len(gaps) >= 3  # before the first step, and after each
    print(f"{transport}, {layout}: worst gap {max(gaps):.1e}")
    assert max(gaps) <= TOLERANCE
    trained = [line for line in lines if "router/dropped/mean" in line]
    assert len(trained) == 2
    for line in trained:
        assert line["router/dropped/mean"] == 0.0
        assert line["discrepancy/max"] <= TOLERANCE
