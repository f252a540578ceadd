"""CISPO (arXiv 2506.13585): the policy gradient with a clipped weight, `sg[clip(r)] A log p_theta`,
where r = p_theta / p_old and clip(r) = clip(r, 1 - clip_low, 1 + clip_high). Every token keeps a
gradient.
"""

from __future__ import annotations

import torch

from megatron_rl.objective.inputs import LossInputs, Surrogate
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO


def surrogate(inputs: LossInputs) -> Surrogate:
    """The surrogate of every token. A bound acts independently of the advantage's sign."""
    policy = inputs.policy_logprobs
    log_ratio = (policy.detach() - inputs.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.double().exp()
    nowhere = torch.zeros_like(inputs.mask)
    weight = ratio.clamp(1.0 - inputs.clip_low, 1.0 + inputs.clip_high).float()
    return Surrogate(
        values=weight * inputs.advantages * policy,
        ratio=ratio,
        is_clipped_low=ratio < 1.0 - inputs.clip_low,
        is_clipped_high=ratio > 1.0 + inputs.clip_high,
        is_capped=nowhere,
        is_dual_clipped=nowhere,
    )
