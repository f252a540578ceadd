"""Policy and recomputed log-probs and shaped advantages come in, the loss of every token goes out.

    r[t] = exp(policy_logprobs[t] - recomputed_logprobs[t])
    loss[t] = -min(r[t] * A'[t], clip(r[t], 1 - clip_low, 1 + clip_high) * A'[t])

Source: PPO (arXiv 1707.06347), with the separate upper bound of DAPO (arXiv 2503.14476).
"""

from __future__ import annotations

import math

import torch

from megatron_rl.observe.metrics import Max, Mean, Metric

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to +-20 before exp, so that ratios stay below 4.9e8


def policy_loss(
    policy_logprobs: torch.Tensor,
    recomputed_logprobs: torch.Tensor,
    shaped_advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Clipped surrogate per token, to be minimised; goes on to `objective.normalize`.

    Args:
        policy_logprobs: [T] float32, under gradient.
        recomputed_logprobs: [T] float32, of the learner before the update; no gradient flows
            through it.
        shaped_advantages: [T] float32, `A - lambda * delta`; no gradient flows through it.
        mask: [T] bool, True = kept. Where it is False, loss and gradient are exactly 0, whatever
            stands in the other tensors there, NaN and infinities included.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        entropy: [T] float32 of the policy's distribution, only for the metric; None where nobody
            computed it.

    Returns:
        loss [T] float32, and the metrics of the kept tokens: `loss/clip_fraction_low/mean` (ratio
        below the lower bound, advantage negative: the clip stopped a decrease),
        `loss/clip_fraction_high/mean`, `loss/ratio/mean`,
        `loss/ratio/max`, `loss/update_kl/mean` (k3 estimate of KL(recomputed || policy), in nats),
        `loss/shaped_advantage/mean`, and `loss/entropy/mean` when given.
    """
    shape = tuple(mask.shape)
    for name, tensor in (
        ("policy_logprobs", policy_logprobs),
        ("recomputed_logprobs", recomputed_logprobs),
        ("shaped_advantages", shaped_advantages),
        *(() if entropy is None else (("entropy", entropy),)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"policy_loss: expected {name} of the mask's shape {shape}, "
                f"got {tuple(tensor.shape)}"
            )
    # Selected before the exponential: 0 * inf in its backward is NaN, also where the mask is False.
    policy = torch.where(mask, policy_logprobs.float(), 0.0)
    recomputed = torch.where(mask, recomputed_logprobs.detach().float(), 0.0)
    advantages = torch.where(mask, shaped_advantages.detach().float(), 0.0)

    log_ratio = (policy - recomputed).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    loss = torch.where(mask, -surrogate, 0.0)
    with torch.no_grad():
        metrics = _metrics(log_ratio, advantages, mask, clip_low, clip_high, entropy)
    return loss, metrics


def _metrics(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
    entropy: torch.Tensor | None,
) -> dict[str, Metric]:
    log_ratio, advantages = log_ratio[mask].double(), advantages[mask].double()
    ratio = log_ratio.exp()
    averaged = {
        "loss/clip_fraction_low/mean": (ratio < 1.0 - clip_low) & (advantages < 0),
        "loss/clip_fraction_high/mean": (ratio > 1.0 + clip_high) & (advantages > 0),
        "loss/ratio/mean": ratio,
        # KL(recomputed || policy) from the recomputed policy's samples: E[r - 1 - log r].
        "loss/update_kl/mean": torch.expm1(log_ratio) - log_ratio,
        "loss/shaped_advantage/mean": advantages,
    }
    if entropy is not None:
        averaged["loss/entropy/mean"] = entropy[mask]
    metrics: dict[str, Metric] = {
        name: Mean(sum=values.sum(dtype=torch.float64), count=values.numel())
        for name, values in averaged.items()
    }
    metrics["loss/ratio/max"] = Max(ratio.max() if ratio.numel() else -math.inf)
    return metrics
