"""What the tool makes of a run's seconds; the run itself is the benchmark."""

from pathlib import Path

import pytest

from megatron_rl.config import Config, LoopConfig
from megatron_rl.errors import ConfigError
from megatron_rl.process.command import Progress
from tools.bench_constraint import NUM_WARM_UP, bench, cost_of


def test_the_cost_is_the_difference_of_medians_over_a_plain_step():
    steps = range(1, NUM_WARM_UP + 7)
    records = [
        {"step": step, "speed/seconds/rollout": 0.5, "speed/seconds/learner": 1.5, "reward/mean": 1}
        for step in steps
    ]
    # Odd steps carry the constraint; the first ones and one outlier a kind do not count.
    seconds = {step: 1.02 if step % 2 else 1.0 for step in steps} | {1: 9.0, 2: 5.0, 11: 7.0, 12: 9}
    assert cost_of(records, seconds) == (
        "training and metrics, medians of 6 steps in turn: 1.0200 s with the constraint, "
        "1.0000 s without; +1.00% of a step of 2.000 s"
    )


def test_a_run_that_is_too_short_to_tell(tmp_path: Path):
    config = Config(run_dir=str(tmp_path), loop=LoopConfig(num_steps=12))
    with pytest.raises(ConfigError, match=r"expected loop\.num_steps of at least 30"):
        bench(config, Progress())
