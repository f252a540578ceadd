"""Policy and old log-probs and shaped advantages come in, the loss of every token goes out.

    loss[t] = -weight[t] * surrogate(p_theta[t] / p_old[t], A'[t])

The surrogates, PPO's clipped one among them, stand in `objective.surrogate`. The old policy is the
learner before the update (`recomputed_logprobs`), or the engine (`rollout_logprobs`) where the
recomputation is bypassed.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.objective.surrogate import MAX_LOG_RATIO as MAX_LOG_RATIO
from megatron_rl.objective.surrogate import Surrogate, surrogate
from megatron_rl.observe.metrics import Max, Mean, Metric


def policy_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    shaped_advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kind: str = "ppo_clip",
    sequence_ids: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The surrogate's loss per token, to be minimised; goes on to `objective.normalize`.

    Args:
        policy_logprobs: [T] float32, under gradient.
        old_logprobs: [T] float32, of the policy that the ratio is taken against; no gradient flows
            through it.
        shaped_advantages: [T] float32, `A - lambda * delta`; no gradient flows through it.
        mask: [T] bool, True = kept. Where it is False, loss and gradient are exactly 0, whatever
            stands in the other tensors there, NaN and infinities included.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; for dppo_tv the
            probability may move by -clip_low to +clip_high.
        kind: ppo_clip, gspo, cispo or dppo_tv.
        sequence_ids: [T] int64, 0 to S-1, -1 on padding; only gspo needs them.
        weights: [T] float32, importance weights of the tokens; None: 1. No gradient flows.
        entropy: [T] float32 of the policy's distribution, only for the metric; None where nobody
            computed it.

    Returns:
        loss [T] float32, and the metrics of the kept tokens: `loss/clip_fraction_low/mean` (ratio
        below the lower bound, advantage negative: the clip stopped a decrease; for cispo whatever
        the advantage), `loss/clip_fraction_high/mean`, `loss/ratio/mean`, `loss/ratio/max`,
        `loss/update_kl/mean` (k3 estimate of KL(old || policy), in nats),
        `loss/shaped_advantage/mean`, and `loss/entropy/mean` when given.
    """
    shape = tuple(mask.shape)
    for name, tensor in (
        ("policy_logprobs", policy_logprobs),
        ("old_logprobs", old_logprobs),
        ("shaped_advantages", shaped_advantages),
        ("sequence_ids", sequence_ids),
        ("weights", weights),
        ("entropy", entropy),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"policy_loss: expected {name} of the mask's shape {shape}, "
                f"got {tuple(tensor.shape)}"
            )
    # Selected before the exponential: 0 * inf in its backward is NaN, also where the mask is False.
    policy = torch.where(mask, policy_logprobs.float(), 0.0)
    old = torch.where(mask, old_logprobs.detach().float(), 0.0)
    advantages = torch.where(mask, shaped_advantages.detach().float(), 0.0)

    found = surrogate(
        kind,
        policy,
        old,
        advantages,
        mask,
        sequence_ids,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    values = found.values if weights is None else weights.detach() * found.values
    loss = torch.where(mask, -values, 0.0)
    with torch.no_grad():
        log_ratio = (policy - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        metrics = _metrics(found, log_ratio, advantages, mask, entropy)
    return loss, metrics


def _metrics(
    found: Surrogate,
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    entropy: torch.Tensor | None,
) -> dict[str, Metric]:
    log_ratio = log_ratio[mask].double()
    ratio = found.ratio[mask]
    averaged = {
        "loss/clip_fraction_low/mean": found.is_clipped_low[mask],
        "loss/clip_fraction_high/mean": found.is_clipped_high[mask],
        "loss/ratio/mean": ratio,
        # KL(old || policy) from the old policy's samples: E[r - 1 - log r].
        "loss/update_kl/mean": torch.expm1(log_ratio) - log_ratio,
        "loss/shaped_advantage/mean": advantages[mask].double(),
    }
    if entropy is not None:
        averaged["loss/entropy/mean"] = entropy[mask]
    metrics: dict[str, Metric] = {
        name: Mean(sum=values.sum(dtype=torch.float64), count=values.numel())
        for name, values in averaged.items()
    }
    metrics["loss/ratio/max"] = Max(ratio.max() if ratio.numel() else -math.inf)
    return metrics
