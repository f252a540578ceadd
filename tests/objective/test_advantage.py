import math

import pytest
import torch

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.objective.advantage import DEVIATIONS, group_advantages


def test_numbers_worked_by_hand():
    # Mean 1, deviations -1, 0, 0, 1: population variance 2/4, standard deviation sqrt(1/2).
    advantages = group_advantages(torch.tensor([0.0, 1.0, 1.0, 2.0]), epsilon=0.0)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == pytest.approx([-math.sqrt(2), 0.0, 0.0, math.sqrt(2)], rel=1e-7)


def test_unbiased_deviation_worked_by_hand():
    # The same deviations -1, 0, 0, 1: unbiased variance 2/3, standard deviation sqrt(2/3).
    rewards = torch.tensor([0.0, 1.0, 1.0, 2.0])
    advantages = group_advantages(rewards, epsilon=0.0, deviation="unbiased")
    assert advantages.tolist() == pytest.approx([-math.sqrt(1.5), 0, 0, math.sqrt(1.5)], rel=1e-7)
    # Rewards 0 and 1: unbiased variance 2 * (1/2)^2 / 1 = 1/2.
    two = group_advantages(torch.tensor([0.0, 1.0]), epsilon=0.0, deviation="unbiased")
    assert two.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-7)


def test_epsilon_is_added_to_the_deviation():
    # Rewards 0 and 1: deviation 1/2, so 0.5 / (0.5 + 0.5) with epsilon 1/2.
    advantages = group_advantages(torch.tensor([0.0, 1.0]), epsilon=0.5)
    assert advantages.tolist() == [-0.5, 0.5]
    default = group_advantages(torch.tensor([0.0, 1.0]))
    assert default.tolist() == pytest.approx([-0.5 / 0.500001, 0.5 / 0.500001], rel=1e-7)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3, 1e9])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_equal_rewards_give_exact_zeros(reward, size, deviation):
    rewards = torch.full((size,), reward)
    assert group_advantages(rewards, deviation=deviation).tolist() == [0.0] * size


@pytest.mark.parametrize(
    "rewards",
    [
        [0.1 + 0.2, 0.3, 0.3, 0.3],
        [0.7 + 0.1, 0.8],
        [sum([0.1] * 10), 1.0],
        [1e9, 1e9 + 0.25],
        [-0.3, -0.1 - 0.2, -0.3],
        [float(torch.tensor([1.1, 2.2, 3.3]).sum()), 6.6],  # summed in float32
    ],
)
def test_rewards_that_differ_by_rounding_are_equal(rewards):
    assert len(set(rewards)) > 1
    rewards = torch.tensor(rewards, dtype=torch.float64)
    assert group_advantages(rewards, epsilon=1e-12).tolist() == [0.0] * len(rewards)


def test_rounding_beside_a_real_difference_worked_by_hand():
    # Mean 0.3 of 0.3, 0.3 + rounding, 0.1 and 0.5: deviation sqrt(0.08 / 4) = 0.1 sqrt(2).
    rewards = torch.tensor([0.3, 0.1 + 0.2, 0.1, 0.5], dtype=torch.float64)
    advantages = group_advantages(rewards, epsilon=0.0)
    assert advantages[:2].tolist() == [0.0, 0.0]
    assert advantages[2:].tolist() == pytest.approx([-math.sqrt(2), math.sqrt(2)], rel=1e-6)


def test_a_small_difference_is_a_difference():
    rewards = torch.tensor([1.0, 1.0 + 1e-4], dtype=torch.float64)
    assert group_advantages(rewards, epsilon=0.0).tolist() == pytest.approx([-1.0, 1.0])


def test_a_group_of_nobody_has_no_advantages():
    assert group_advantages(torch.zeros(0)).tolist() == []


def test_shift_and_scale_do_not_matter():
    rewards = torch.tensor([0.2, 0.9, 0.4, 0.4], dtype=torch.float64)
    torch.testing.assert_close(
        group_advantages(rewards, epsilon=0.0), group_advantages(3 * rewards + 5, epsilon=0.0)
    )


def test_refuses_what_is_no_group():
    with pytest.raises(ValueError, match=r"\[G\]"):
        group_advantages(torch.zeros(2, 3))
    with pytest.raises(DataError, match="finite"):
        group_advantages(torch.tensor([0.0, math.nan]))
    with pytest.raises(ConfigError, match="expected one of none, population, unbiased, got 'std'"):
        group_advantages(torch.zeros(2), deviation="std")


def test_without_the_deviation_worked_by_hand():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 3.0]), deviation="none")
    assert advantages.tolist() == [0.0, -1.0, -1.0, 2.0]
