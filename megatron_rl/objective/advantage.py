"""Computes the advantages of one group from its rewards.

    A[i] = (R[i] - mean) / (std + epsilon)

Source: GRPO (arXiv 2402.03300), with the population standard deviation that DC-GRPO (arXiv
2606.08779) uses; Dr. GRPO (arXiv 2503.20783) omits the division.
"""

from __future__ import annotations

import torch

from megatron_rl.errors import DataError


def group_advantages(
    rewards: torch.Tensor, *, epsilon: float = 1e-6, should_scale: bool = True
) -> torch.Tensor:
    """Advantages of the `G` responses to one prompt, relative to each other.

    Args:
        rewards: [G], any real dtype, finite. A group of one response, or of equal rewards, has
            advantages of exactly 0.
        epsilon: added to the standard deviation, in units of the reward.
        should_scale: whether to divide by the standard deviation.

    Returns:
        [G] float32; computed in float64 and rounded once.

    Raises:
        ValueError: `rewards` is not one-dimensional. DataError: a reward is not finite.
    """
    if rewards.dim() != 1:
        raise ValueError(
            f"group_advantages: expected rewards of shape [G], got {tuple(rewards.shape)}"
        )
    rewards = rewards.detach().double()
    if not bool(torch.isfinite(rewards).all()):
        raise DataError(
            f"group_advantages: expected finite rewards, got {rewards.tolist()}; "
            "look at the verifier named in data.tasks"
        )
    # The first reward is subtracted first, so that equal rewards become exact zeros. Subtracting
    # their mean would not guarantee that, because the mean is a rounded sum.
    shifted = rewards - rewards[:1]
    centered = shifted - shifted.mean()
    if not should_scale:
        return centered.float()
    deviation = centered.square().mean().sqrt()
    return (centered / (deviation + epsilon)).float()
