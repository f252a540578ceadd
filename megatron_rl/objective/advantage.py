"""Computes the advantages of one group from its rewards.

    A[i] = (R[i] - mean) / (std + epsilon)
    std  = sqrt(sum of (R[i] - mean)^2 / G)          population
           sqrt(sum of (R[i] - mean)^2 / (G - 1))    unbiased, larger by sqrt(G / (G - 1))

Source: GRPO (arXiv 2402.03300). Neither that paper nor DC-GRPO's (arXiv 2606.08779) says which
standard deviation it takes; verl and TRL take the unbiased one. Dr. GRPO (arXiv 2503.20783) omits
the division.
"""

from __future__ import annotations

from typing import get_args

import torch

from megatron_rl.config.choices import AdvantageStd
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.records import REWARD_ROUNDING

DEVIATIONS = get_args(AdvantageStd)


def group_advantages(
    rewards: torch.Tensor, *, epsilon: float = 1e-6, deviation: str = "population"
) -> torch.Tensor:
    """Advantages of the `G` responses to one prompt, relative to each other.

    Args:
        rewards: [G], any real dtype, finite. A group of one response, or of rewards that are equal
            within rounding, has advantages of exactly 0.
        epsilon: added to the standard deviation, in units of the reward.
        deviation: "population" or "unbiased" standard deviation; "none": the advantages are not
            divided.

    Returns:
        [G] float32; computed in float64 and rounded once.

    Raises:
        ValueError: `rewards` is not one-dimensional. DataError: a reward is not finite.
        ConfigError: `deviation` is unknown.
    """
    centered = reward_deviations(rewards)
    if deviation == "none":
        return centered.float()
    if deviation == "population":
        variance = centered.square().mean()
    elif deviation == "unbiased":  # a group of one response keeps the variance 0
        variance = centered.square().sum() / max(1, centered.numel() - 1)
    else:
        raise ConfigError(
            f"objective.advantage_std: expected one of {', '.join(DEVIATIONS)}, got {deviation!r}"
        )
    return (centered / (variance.sqrt() + epsilon)).float()


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
