"""What the tool makes of a run's seconds; the run itself is the benchmark."""

from pathlib import Path

import pytest

from megatron_rl.config import Config, LoopConfig
from megatron_rl.errors import ConfigError
from megatron_rl.process.command import Progress
from tools.bench_score_centering import NUM_WARM_UP, bench, cost_of


def test_the_cost_is_the_median_of_the_pairs():
    # Odd steps are centered; of three pairs, the last is slow throughout.
    seconds = {
        5: (1.2, 2.2),
        6: (1.0, 2.0),
        7: (1.5, 2.4),
        8: (1.0, 2.0),
        9: (13.0, 23),
        10: (10, 20),
    }
    records = [
        {"step": step, "speed/seconds/rollout": rollout, "speed/seconds/learner": learner}
        for step, (rollout, learner) in ({1: (9.0, 9.0), 2: (1.0, 1.0)} | seconds).items()
    ]
    assert min(seconds) == NUM_WARM_UP + 1
    assert cost_of(records) == [
        "sampling: 1.300 times plain (1.200 to 1.500), of 1.000 s, 3 pairs",
        "training step: 1.150 times plain (1.100 to 1.200), of 2.000 s, 3 pairs",
        "whole step: 1.200 times plain (1.133 to 1.300), of 3.000 s, 3 pairs",
    ]


def test_a_run_that_cannot_tell(tmp_path: Path):
    config = Config(run_dir=str(tmp_path), loop=LoopConfig(num_steps=100))
    with pytest.raises(ConfigError, match=r"got 100, objective\.score_centering\.enabled=False"):
        bench(config, Progress())
