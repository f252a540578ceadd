"""Computes the KL term of every token's loss, or of its advantage, from the log-probs of the policy
and of the reference policy. Both are log-probs over the whole distribution.

With `d = log p_ref - log p_theta` (Schulman 2020, "Approximating KL divergence"):

    k1 = -d,   k2 = d^2 / 2,   k3 = exp(d) - 1 - d        estimates of KL(p_theta || p_ref)

k3 is GRPO's term in the loss (arXiv 2402.03300). On the policy's own samples, the expected gradient
of k2 is the gradient of the KL. The expected gradient of k1 in the loss is 0, so k1 is subtracted
from the advantages instead, as in PPO's reward (arXiv 2203.02155): `A' = A - coefficient * k1`,
with k1 at the policy's current log-probs.
"""

from __future__ import annotations

from typing import get_args

import torch

from megatron_rl.config.choices import KLEstimator
from megatron_rl.errors import ConfigError
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO
from megatron_rl.observe.metrics import Mean, Metric

ESTIMATORS = get_args(KLEstimator)


def reference_kl(
    policy_logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    estimator: str,
) -> torch.Tensor:
    """The KL to the reference policy, token by token; gradient flows through `policy_logprobs`.

    Args:
        policy_logprobs: [T] float32. reference_logprobs: [T] float32, without gradient.
        mask: [T] bool; value and gradient are exactly 0 where it is False.
        estimator: k1, k2 or k3.

    Returns:
        [T] float32 in nats; log-ratios are clamped to +-20.
    """
    policy = torch.where(mask, policy_logprobs.float(), 0.0)
    reference = torch.where(mask, reference_logprobs.detach().float(), 0.0)
    log_ratio = (reference - policy).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ConfigError(
        f"objective.kl.estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}"
    )


def reference_metrics(
    policy_logprobs: torch.Tensor, reference_logprobs: torch.Tensor, mask: torch.Tensor
) -> dict[str, Metric]:
    """`reference/kl_k1/mean` and `reference/kl_k3/mean`, in nats, over the kept tokens."""
    count = mask.sum(dtype=torch.float64)
    with torch.no_grad():
        return {
            f"reference/kl_{name}/mean": Mean(
                sum=reference_kl(policy_logprobs, reference_logprobs, mask, estimator=name).sum(
                    dtype=torch.float64
                ),
                count=count,
            )
            for name in ("k1", "k3")
        }
