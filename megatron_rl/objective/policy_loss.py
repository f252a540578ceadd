"""Computes the loss of every token from the policy's and the old log-probs and the advantages.

    loss[t] = -weight[t] * surrogate(p_theta[t] / p_old[t], A'[t])

The surrogates, including PPO's clipped one, are the modules of `objective/policy/`.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.objective.inputs import LossInputs, PolicyLoss, Surrogate, check_shape
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO
from megatron_rl.observe.metrics import Max, Mean, Metric

# Name of the KL from each old policy to the current one.
KL_NAMES: dict[str, str] = {"recomputed": "update_kl", "rollout": "rollout_kl"}


def policy_loss(
    surrogate: PolicyLoss,
    inputs: LossInputs,
    *,
    weights: torch.Tensor | None,
    entropy: torch.Tensor,
    old_policy: str,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The surrogate's loss per token, to be minimised; `objective.normalize` reduces it.

    Args:
        surrogate: from `objective.policy.policy_loss_named`.
        inputs: masked by `LossInputs.of`.
        weights: [T] float32, importance weights of the tokens; None: 1. They have no gradient.
        entropy: [T] float32, of the policy's distribution; used only for the metric.
        old_policy: "recomputed" or "rollout", the policy of `inputs.old_logprobs`; it names the
            metric of the KL.

    Returns:
        loss [T] float32, exactly 0 in value and gradient where the mask is False; and the metrics
        of the kept tokens: `loss/clip_fraction_low/mean` (the ratio is below the lower bound and
        the advantage negative, so the clip stopped a decrease; for cispo with any advantage),
        `loss/clip_fraction_high/mean`, with a cap on the ratio or a dual clip
        `loss/clip_fraction_cap/mean` or `loss/clip_fraction_dual/mean`, the share of tokens on
        which it acted; `loss/ratio/mean`, `loss/ratio/max`,
        `loss/shaped_advantage/mean`, `loss/entropy/mean`, and the k3 estimate of
        KL(old || policy) in nats, which is `loss/update_kl/mean` if the old policy is the learner
        before the update, and `loss/rollout_kl/mean` if it is the engine: that KL contains the gap
        between learner and engine.

    Raises:
        ValueError: the shape of weights or entropy differs from that of the mask.
    """
    mask = inputs.mask
    check_shape("entropy", entropy, mask)
    found = surrogate(inputs)
    values = found.values
    if weights is not None:
        check_shape("weights", weights, mask)
        values = weights.detach() * values
    loss = torch.where(mask, -values, 0.0)
    with torch.no_grad():
        metrics = _metrics(found, inputs, entropy, old_policy)
    return loss, metrics


def _metrics(
    found: Surrogate, inputs: LossInputs, entropy: torch.Tensor, old_policy: str
) -> dict[str, Metric]:
    mask = inputs.mask
    log_ratio = inputs.policy_logprobs - inputs.old_logprobs
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[mask].double()
    ratio = found.ratio[mask]
    averaged = {
        "loss/clip_fraction_low/mean": found.is_clipped_low[mask],
        "loss/clip_fraction_high/mean": found.is_clipped_high[mask],
        "loss/ratio/mean": ratio,
        # KL(old || policy), estimated from the old policy's samples: E[r - 1 - log r].
        f"loss/{KL_NAMES[old_policy]}/mean": torch.expm1(log_ratio) - log_ratio,
        "loss/shaped_advantage/mean": inputs.advantages[mask].double(),
        "loss/entropy/mean": entropy[mask],
    }
    if inputs.ratio_cap > 0:
        averaged["loss/clip_fraction_cap/mean"] = found.is_capped[mask]
    if inputs.dual_clip > 0:
        averaged["loss/clip_fraction_dual/mean"] = found.is_dual_clipped[mask]
    metrics: dict[str, Metric] = {
        name: Mean(sum=values.sum(dtype=torch.float64), count=values.numel())
        for name, values in averaged.items()
    }
    metrics["loss/ratio/max"] = Max(ratio.max() if ratio.numel() else -math.inf)
    return metrics
