"""Computes the advantages of one group from its rewards.

    A[i] = (R[i] - mean) / (std + epsilon)

Source: GRPO (arXiv 2402.03300), with the population standard deviation that DC-GRPO (arXiv
2606.08779) uses; Dr. GRPO (arXiv 2503.20783) omits the division.
"""

from __future__ import annotations

import torch

from megatron_rl.errors import DataError
from megatron_rl.records import REWARD_ROUNDING


def group_advantages(
    rewards: torch.Tensor, *, epsilon: float = 1e-6, should_scale: bool = True
) -> torch.Tensor:
    """Advantages of the `G` responses to one prompt, relative to each other.

    Args:
        rewards: [G], any real dtype, finite. A group of one response, or of rewards that are equal
            within rounding, has advantages of exactly 0.
        epsilon: added to the standard deviation, in units of the reward.
        should_scale: whether to divide by the standard deviation.

    Returns:
        [G] float32; computed in float64 and rounded once.

    Raises:
        ValueError: `rewards` is not one-dimensional. DataError: a reward is not finite.
    """
    centered = reward_deviations(rewards)
    if not should_scale:
        return centered.float()
    deviation = centered.square().mean().sqrt()
    return (centered / (deviation + epsilon)).float()


def reward_deviations(rewards: torch.Tensor) -> torch.Tensor:
    """The rewards of one group minus their mean.

    Args:
        rewards: [G], any real dtype, finite.

    Returns:
        [G] float64, exactly 0 for rewards that equal the mean within rounding (REWARD_ROUNDING).

    Raises:
        ValueError: `rewards` is not one-dimensional. DataError: a reward is not finite.
    """
    if rewards.dim() != 1:
        raise ValueError(f"group rewards: expected shape [G], got {tuple(rewards.shape)}")
    rewards = rewards.detach().double()
    if not bool(torch.isfinite(rewards).all()):
        raise DataError(
            f"group rewards: expected finite numbers, got {rewards.tolist()}; "
            "look at the verifier named in data.tasks"
        )
    if not rewards.numel():
        return rewards
    # The first reward is subtracted first, so that the mean of nearly equal rewards keeps its
    # digits.
    shifted = rewards - rewards[:1]
    centered = shifted - shifted.mean()
    is_rounding = centered.abs() <= REWARD_ROUNDING * rewards.abs().max()
    return torch.where(is_rounding, 0.0, centered)
