import math

import pytest
import torch

from megatron_rl.errors import DataError
from megatron_rl.objective.advantage import group_advantages


def test_numbers_worked_by_hand():
    # Mean 1, deviations -1, 0, 0, 1: population variance 2/4, standard deviation sqrt(1/2).
    advantages = group_advantages(torch.tensor([0.0, 1.0, 1.0, 2.0]), epsilon=0.0)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == pytest.approx([-math.sqrt(2), 0.0, 0.0, math.sqrt(2)], rel=1e-7)


def test_epsilon_is_added_to_the_deviation():
    # Rewards 0 and 1: deviation 1/2, so 0.5 / (0.5 + 0.5) with epsilon 1/2.
    advantages = group_advantages(torch.tensor([0.0, 1.0]), epsilon=0.5)
    assert advantages.tolist() == [-0.5, 0.5]
    default = group_advantages(torch.tensor([0.0, 1.0]))
    assert default.tolist() == pytest.approx([-0.5 / 0.500001, 0.5 / 0.500001], rel=1e-7)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3, 1e9])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_equal_rewards_give_exact_zeros(reward, size):
    assert group_advantages(torch.full((size,), reward)).tolist() == [0.0] * size


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


def test_without_the_deviation_worked_by_hand():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 3.0]), should_scale=False)
    assert advantages.tolist() == [0.0, -1.0, -1.0, 2.0]
    equal = group_advantages(torch.tensor([0.1] * 3), should_scale=False)
    assert equal.tolist() == [0.0] * 3
