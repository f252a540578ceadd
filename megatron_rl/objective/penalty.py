"""Differentiable penalties on the gap between the policy and the engine: terms of the loss whose
coefficient is lambda, in place of the shaping of advantages (constraint.py).

With p_theta under gradient, p_inf without, per sampled token:

    differentiable:      |p_theta - p_inf|
    squared_difference:  (p_theta - p_inf)^2
    squared_ratio:       (p_theta / p_inf - 1)^2
    squared_log_ratio:   (log p_theta - log p_inf)^2

On tokens sampled from p_inf, value and gradient of the squared forms are unbiased estimates of the
penalties that the theory of DCMDP is about (arXiv 2606.08779, App. B), sums over the vocabulary a:

    Omega_diff  = sum_a p_inf(a) (p_theta(a) - p_inf(a))^2
    Omega_ratio = sum_a (p_theta(a) - p_inf(a))^2 / p_inf(a)       (the chi-square divergence)
    Omega_log   = sum_a p_inf(a) (log p_theta(a) / p_inf(a))^2

The first form is near to the second: the square of its mean is at most Omega_diff.
"""

from __future__ import annotations

from typing import get_args

import torch

from megatron_rl.config.choices import DifferentiablePenalty
from megatron_rl.errors import ConfigError
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO

FORMS = get_args(DifferentiablePenalty)


def differentiable_penalty(
    policy_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor, *, form: str
) -> torch.Tensor:
    """The penalty of every token, under gradient. With p = p_theta, q = p_inf, the derivatives by
    log p are `sign(p - q) p`, `2 (p - q) p`, `2 (p/q - 1) p/q` and `2 log(p/q)`.

    Args:
        policy_logprobs: [T] float, under gradient. rollout_logprobs: [T] float. mask: [T] bool.
        form: see the docstring of this module.

    Returns:
        [T], policy_logprobs' dtype, computed in float64. Value and gradient are exactly 0 where the
        mask is False, and where both probabilities are equal. In "squared_ratio" the log-ratio is
        clamped to +-20, and the gradient is 0 beyond.

    Raises:
        ConfigError: `form` is unknown.
    """
    policy = torch.where(mask, policy_logprobs.double(), 0.0)
    rollout = torch.where(mask, rollout_logprobs.detach().double(), 0.0)
    if form == "differentiable":
        penalty = (policy.exp() - rollout.exp()).abs()
    elif form == "squared_difference":
        penalty = (policy.exp() - rollout.exp()).square()
    elif form == "squared_ratio":
        log_ratio = (policy - rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        penalty = log_ratio.expm1().square()
    elif form == "squared_log_ratio":
        penalty = (policy - rollout).square()
    else:
        raise ConfigError(
            f"objective.constraint.penalty: expected one of shaping, {', '.join(FORMS)}, "
            f"got {form!r}"
        )
    return penalty.to(policy_logprobs.dtype)
