"""Bounds on a ratio that several policy losses use: PPO's clipped surrogate and its dual clip, and
the truncated ratio.

    clipped:     min(r A, clip(r) A),   clip(r) = clip(r, 1 - clip_low, 1 + clip_high)
    dual clip:   max(min(r A, clip(r) A), dual_clip * A) where A < 0      (arXiv 1912.09729)
    truncated:   min(r, ratio_cap), with the gradient of sg[min(r, ratio_cap)] log p_theta

The clip does not bound the surrogate of a negative advantage whose ratio is large. The dual clip
stops the gradient there; the truncated ratio, which verl and DPPO (arXiv 2602.04879, section 5.4)
use, keeps it with the weight ratio_cap.
"""

from __future__ import annotations

import torch

from megatron_rl.objective.inputs import LossInputs, Surrogate


def clipped_surrogate(
    ratio: torch.Tensor, log_ratio: torch.Tensor, inputs: LossInputs
) -> Surrogate:
    """`min(r A, clip(r) A)` of the truncated ratio, with the dual clip. A bound of the clip acts
    only where it lowers the surrogate.

    Args:
        ratio: [T] float32, under gradient.
        log_ratio: [T] float, the logarithm of `ratio`, without gradient; the metrics are computed
            from it in float64.
    """
    advantages = inputs.advantages
    exact = log_ratio.double().exp()
    ratio, is_above = truncated_ratio(ratio, exact, inputs)
    clipped = ratio.clamp(1.0 - inputs.clip_low, 1.0 + inputs.clip_high)
    values = torch.minimum(ratio * advantages, clipped * advantages)
    is_dual_clipped = torch.zeros_like(inputs.mask)
    if inputs.dual_clip > 0:
        is_dual_clipped = (exact > inputs.dual_clip) & (advantages < 0)
        values = torch.where(is_dual_clipped, inputs.dual_clip * advantages, values)
    return Surrogate(
        values=values,
        ratio=exact,
        is_clipped_low=(exact < 1.0 - inputs.clip_low) & (advantages < 0),
        is_clipped_high=(exact > 1.0 + inputs.clip_high) & (advantages > 0),
        is_capped=is_above & (advantages < 0),
        is_dual_clipped=is_dual_clipped,
    )


def truncated_ratio(
    ratio: torch.Tensor, exact: torch.Tensor, inputs: LossInputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """`min(r, ratio_cap)`, whose derivative by log p_theta is the truncated ratio itself, also
    above the cap.

    Args:
        ratio: [T] float32, r under gradient.
        exact: [T] float64, r without gradient.

    Returns:
        [T] float32, `ratio` itself without a cap; and [T] bool, True where r is above the cap.
    """
    if inputs.ratio_cap == 0:
        return ratio, torch.zeros_like(inputs.mask)
    is_above = exact > inputs.ratio_cap
    policy = inputs.policy_logprobs
    # Not a multiple of r, whose gradient is 0 where the log-ratio is clamped.
    at_cap = inputs.ratio_cap * (policy - policy.detach()).exp()
    return torch.where(is_above, at_cap, ratio), is_above
