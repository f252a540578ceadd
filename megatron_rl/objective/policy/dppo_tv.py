"""DPPO (arXiv 2602.04879): the surrogate r A with r = p_theta / p_old, but 0 where p_theta - p_old
has left [-clip_low, clip_high] in the direction of the advantage. This is a trust region in total
variation; its bounds are probabilities, not ratios. The ratio is not clipped, but truncated at
ratio_cap (its section 5.4).
"""

from __future__ import annotations

import torch

from megatron_rl.objective.clipping import truncated_ratio
from megatron_rl.objective.inputs import LossInputs, Surrogate
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO


def surrogate(inputs: LossInputs) -> Surrogate:
    """The surrogate of every token; outside the trust region value and gradient are 0."""
    policy, old, advantages = inputs.policy_logprobs, inputs.old_logprobs, inputs.advantages
    log_ratio = (policy - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    exact = log_ratio.detach().double().exp()
    ratio, is_above = truncated_ratio(log_ratio.exp(), exact, inputs)
    moved = policy.detach().double().exp() - old.double().exp()
    is_high = (moved > inputs.clip_high) & (advantages > 0)
    is_low = (moved < -inputs.clip_low) & (advantages < 0)
    is_outside = is_high | is_low
    return Surrogate(
        values=torch.where(is_outside, 0.0, ratio * advantages),
        ratio=exact,
        is_clipped_low=is_low,
        is_clipped_high=is_high,
        is_capped=is_above & ~is_outside & (advantages != 0),
        is_dual_clipped=torch.zeros_like(inputs.mask),
    )
