"""DPPO (arXiv 2602.04879): the unclipped surrogate r A with r = p_theta / p_old, but 0 where
p_theta - p_old has left [-clip_low, clip_high] in the direction of the advantage. This is a trust
region in total variation; its bounds are probabilities, not ratios.
"""

from __future__ import annotations

import torch

from megatron_rl.objective.inputs import LossInputs, Surrogate
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO


def surrogate(inputs: LossInputs) -> Surrogate:
    """The surrogate of every token; outside the trust region value and gradient are 0."""
    policy, old, advantages = inputs.policy_logprobs, inputs.old_logprobs, inputs.advantages
    log_ratio = (policy - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    moved = policy.detach().double().exp() - old.double().exp()
    is_high = (moved > inputs.clip_high) & (advantages > 0)
    is_low = (moved < -inputs.clip_low) & (advantages < 0)
    values = torch.where(is_high | is_low, 0.0, log_ratio.exp() * advantages)
    return Surrogate(
        values=values,
        ratio=log_ratio.detach().double().exp(),
        is_clipped_low=is_low,
        is_clipped_high=is_high,
    )
