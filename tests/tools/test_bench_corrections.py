"""What the tool makes of a run's seconds; the run itself is the benchmark."""

from pathlib import Path

import pytest

from megatron_rl.config import Config, LoopConfig
from megatron_rl.errors import ConfigError
from megatron_rl.process.command import Progress
from tools.bench_corrections import (
    BASE,
    MEASURED,
    NUM_WARM_UP,
    bench,
    costs_of_a_run,
    costs_of_training,
    objective_of,
    rotated,
)


def test_training_is_the_median_of_the_ratios_on_the_same_rollouts():
    # The first steps, and those without heads, do not count; the last step is slow throughout.
    seconds = {
        BASE: {1: 9.0, 5: 1.0, 6: 7.0, 7: 1.0, 9: 10.0},
        "cis": {1: 1.0, 5: 1.2, 7: 1.5, 9: 13.0},
    }
    assert NUM_WARM_UP == 4
    assert costs_of_training(seconds) == [
        "training step of tis: 1.000 s, 3 steps",
        "training step of cis: 1.300 (1.200 to 1.500) times tis",
    ]


def test_sampling_and_acceptance():
    rollout = {1: 9.0, 2: 1.0, 5: 1.2, 6: 1.0, 7: 1.5, 8: 1.0, 9: 13.0, 10: 10.0}
    acceptance = {6: 0.3, 8: 0.6, 10: 6.0}
    records = [
        {
            "step": step,
            "speed/seconds/rollout": value,
            "speed/seconds/learner": value,
            "speed/seconds/acceptance": acceptance.get(step, 50.0),
        }
        for step, value in rollout.items()
    ]
    assert costs_of_a_run(records) == [
        "sampling with heads: 1.300 (1.200 to 1.500) times without, 3 pairs",
        "acceptance: 0.300 (0.150 to 0.300) of the other phases of a step of tis, 3 steps",
    ]


def test_every_preset_has_its_turn_at_every_place():
    orders = [rotated(MEASURED, number) for number in range(len(MEASURED))]
    assert all(set(order) == set(MEASURED) for order in orders)
    assert {order[0] for order in orders} == set(MEASURED)


def test_presets_are_the_files():
    assert objective_of("cis").importance.mode == "cis"
    assert objective_of("score_centering_tis").score_centering.enabled
    assert objective_of("dc_grpo_squared_ratio").constraint.penalty == "squared_ratio"


def test_a_run_that_cannot_tell(tmp_path: Path):
    config = Config(run_dir=str(tmp_path), loop=LoopConfig(num_steps=100))
    with pytest.raises(ConfigError, match=r"got 100, objective\.score_centering\.enabled=False"):
        bench(config, Progress())
