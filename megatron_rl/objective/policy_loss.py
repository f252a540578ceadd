"""Policy and old log-probs and shaped advantages come in, the loss of every token goes out.

    loss[t] = -weight[t] * surrogate(p_theta[t] / p_old[t], A'[t])

The surrogates, PPO's clipped one among them, are the modules of `objective/policy/`.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.objective.inputs import LossInputs, PolicyLoss, Surrogate, check_shape
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO
from megatron_rl.observe.metrics import Max, Mean, Metric


def policy_loss(
    surrogate: PolicyLoss,
    inputs: LossInputs,
    *,
    weights: torch.Tensor | None,
    entropy: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The surrogate's loss per token, to be minimised; goes on to `objective.normalize`.

    Args:
        surrogate: of `objective.policy.policy_loss_named`.
        inputs: masked, as `LossInputs.of` makes them.
        weights: [T] float32, importance weights of the tokens; None: 1. No gradient flows.
        entropy: [T] float32 of the policy's distribution, only for the metric.

    Returns:
        loss [T] float32, exactly 0 in value and gradient where the mask is False; and the metrics
        of the kept tokens: `loss/clip_fraction_low/mean` (ratio below the lower bound, advantage
        negative: the clip stopped a decrease; for cispo whatever the advantage),
        `loss/clip_fraction_high/mean`, `loss/ratio/mean`, `loss/ratio/max`, `loss/update_kl/mean`
        (k3 estimate of KL(old || policy), in nats), `loss/shaped_advantage/mean`, and
        `loss/entropy/mean`.

    Raises:
        ValueError: weights or entropy of another shape than the mask.
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
        metrics = _metrics(found, inputs, entropy)
    return loss, metrics


def _metrics(found: Surrogate, inputs: LossInputs, entropy: torch.Tensor) -> dict[str, Metric]:
    mask = inputs.mask
    log_ratio = inputs.policy_logprobs - inputs.old_logprobs
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[mask].double()
    ratio = found.ratio[mask]
    averaged = {
        "loss/clip_fraction_low/mean": found.is_clipped_low[mask],
        "loss/clip_fraction_high/mean": found.is_clipped_high[mask],
        "loss/ratio/mean": ratio,
        # KL(old || policy) from the old policy's samples: E[r - 1 - log r].
        "loss/update_kl/mean": torch.expm1(log_ratio) - log_ratio,
        "loss/shaped_advantage/mean": inputs.advantages[mask].double(),
        "loss/entropy/mean": entropy[mask],
    }
    metrics: dict[str, Metric] = {
        name: Mean(sum=values.sum(dtype=torch.float64), count=values.numel())
        for name, values in averaged.items()
    }
    metrics["loss/ratio/max"] = Max(ratio.max() if ratio.numel() else -math.inf)
    return metrics
