"""The figures of finished runs, from records written here."""

from __future__ import annotations

import math

import pytest

from megatron_rl.study.figures import (
    FIRST_STEPS,
    above,
    at_same_entropy,
    is_close,
    late_reward,
    with_error,
)


def run_of(arm: str, seed: int, *rewards: float) -> list[dict[str, object]]:
    steps = enumerate(rewards)
    return [{"arm": arm, "seed": seed, "step": n, "reward/mean": each} for n, each in steps]


def test_runs_are_compared_where_their_entropy_is_the_same() -> None:
    others = [
        {"step": 20, "loss/entropy/mean": entropy, "discrepancy/mean": gap}
        for entropy, gap in [(0.5, 0.9), (0.312, 0.01), (0.3, 0.02), (0.288, 0.03), (0.2, 0.001)]
    ]
    early = [{"step": FIRST_STEPS, "loss/entropy/mean": 0.3, "discrepancy/mean": 0.5}]
    run = [{"step": step, "loss/entropy/mean": 0.3} for step in range(4)]
    assert at_same_entropy(run, early + others, 0) == pytest.approx(0.02)
    assert math.isnan(at_same_entropy(run, early + others[:3], 0))


def test_the_late_reward_is_that_of_the_last_third() -> None:
    """Steps 0 to 6, of which 5 and 6 are the last third of six."""
    assert late_reward(run_of("grpo", 0, 9, 9, 9, 9, 9, 0.5, 0.7)) == pytest.approx(0.6)


def test_arms_are_compared_seed_by_seed() -> None:
    baseline = run_of("grpo", 0, 0.4, 0.5)
    assert above(run_of("tis", 0, 0.4, 0.8), baseline) == pytest.approx(0.3)
    assert math.isnan(above(baseline, baseline))
    assert math.isnan(above(run_of("tis", 1, 0.4, 0.8), None))


def test_arms_are_close_within_two_standard_errors() -> None:
    """Rewards of 0.6 and 0.8 have a standard error of 0.1."""
    runs = [*run_of("grpo", 0, 0, 0.6), *run_of("grpo", 1, 0, 0.8)]

    def others(reward: float, num_seeds: int = 2) -> list[dict[str, object]]:
        return [step for seed in range(num_seeds) for step in run_of("tis", seed, 0, reward)]

    assert is_close([*runs, *others(0.89)], "grpo", "tis")
    assert not is_close([*runs, *others(0.91)], "grpo", "tis")
    assert not is_close([*runs, *others(0.7, num_seeds=1)], "grpo", "tis")  # that tells nothing


def test_a_mean_and_its_standard_error() -> None:
    assert with_error([1.0, 2.0, 3.0]) == "2 ± 0.6"
    assert with_error([0.25]) == "0.25"
    assert with_error([float("nan")]) == ""
