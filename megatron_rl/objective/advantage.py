"""The rewards of one group come in, its advantages go out.

    A[i] = (R[i] - mean) / (std + epsilon)

Source: GRPO (arXiv 2402.03300), with the population standard deviation, as DC-GRPO (arXiv
2606.08779) uses it; Dr. GRPO (arXiv 2503.20783) leaves the division out.
"""

from __future__ import annotations

import torch

from megatron_rl.errors import DataError


def group_advantages(
    rewards: torch.Tensor, *, epsilon: float = 1e-6, should_scale: bool = True
) -> torch.Tensor:
    """Advantages of the `G` responses to one prompt, relative to each other.

    Args:
        rewards: [G], any real dtype, finite. A group of one, and a group of equal rewards, gives
            exact zeros.
        epsilon: added to the standard deviation, in units of the reward.
        should_scale: divide by the standard deviation.

    Returns:
        [G] float32; computed in float64 and rounded once.

    Raises:
        ValueError: not one-dimensional. DataError: a reward that is not finite.
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
    # Relative to the first one, equal rewards are exact zeros, which their mean (a rounded sum)
    # need not keep.
    shifted = rewards - rewards[:1]
    centered = shifted - shifted.mean()
    if not should_scale:
        return centered.float()
    deviation = centered.square().mean().sqrt()
    return (centered / (deviation + epsilon)).float()
