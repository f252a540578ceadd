"""PPO's clipped surrogate of a given ratio, which several policy losses use."""

from __future__ import annotations

import torch

from megatron_rl.objective.inputs import LossInputs, Surrogate


def clipped_surrogate(
    ratio: torch.Tensor, log_ratio: torch.Tensor, inputs: LossInputs
) -> Surrogate:
    """`min(r A, clip(r) A)` with clip(r) = clip(r, 1 - clip_low, 1 + clip_high). A bound acts only
    where it lowers the surrogate.

    Args:
        ratio: [T] float32, under gradient.
        log_ratio: [T] float, the logarithm of `ratio`, without gradient; the metrics are computed
            from it in float64.
    """
    advantages = inputs.advantages
    clipped = ratio.clamp(1.0 - inputs.clip_low, 1.0 + inputs.clip_high)
    exact = log_ratio.double().exp()
    return Surrogate(
        values=torch.minimum(ratio * advantages, clipped * advantages),
        ratio=exact,
        is_clipped_low=(exact < 1.0 - inputs.clip_low) & (advantages < 0),
        is_clipped_high=(exact > 1.0 + inputs.clip_high) & (advantages > 0),
    )
