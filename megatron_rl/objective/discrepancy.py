"""Two log-probs of every sampled token come in, the gap between the engines goes out.

    delta[t] = |exp(recomputed_logprobs[t]) - exp(rollout_logprobs[t])|     (arXiv 2606.08779)

An absolute difference of probabilities: between 0 and 1, and without a ratio that explodes where
both are small. Its mean is over every response token that was sampled, before anything is rejected
or masked: masking the tokens with a large gap must not make the gap look small.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.errors import DivergenceError
from megatron_rl.objective.loss import MAX_LOG_RATIO
from megatron_rl.observe.metrics import Histogram, Max, Mean, Metric
from megatron_rl.records import MAX_LOGPROB_ROUNDING, MISSING_LOGPROB

HISTOGRAM_EDGES = (0.0, *(10.0 ** (tenth / 10) for tenth in range(-70, 1)))  # 0, 1e-7 to 1


def discrepancy(recomputed_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> torch.Tensor:
    """`|p_train - p_inf|` per token.

    Args:
        recomputed_logprobs: any shape, float; the learner's, at the weights before the update.
        rollout_logprobs: same shape, float; the engine's, when it sampled.

    Returns:
        Same shape, float32, exactly 0 where both are equal. Computed in float64: two probabilities
        near 1 that differ in the seventh digit would leave one digit of their difference in
        float32.
    """
    if recomputed_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(
            f"discrepancy: expected log-probs of one shape, got recomputed "
            f"{tuple(recomputed_logprobs.shape)} and rollout {tuple(rollout_logprobs.shape)}"
        )
    return (recomputed_logprobs.double().exp() - rollout_logprobs.double().exp()).abs().float()


def check_logprobs(logprobs: torch.Tensor, mask: torch.Tensor, *, name: str = "log-prob") -> None:
    """Stop before a broken number enters the loss; the caller adds step and rank.

    Args:
        logprobs: [T] float. mask: [T] bool; positions where it is False are not looked at.
        name: which policy's, for the message.

    Raises:
        DivergenceError: a kept log-prob that is NaN, -9999 or below, or above 0; names the worst
            position.
    """
    if logprobs.shape != mask.shape:
        raise ValueError(
            f"check_logprobs: expected logprobs of the mask's shape {tuple(mask.shape)}, "
            f"got {tuple(logprobs.shape)}"
        )
    logprobs = logprobs.detach().float()
    # Written so that NaN, which compares false with everything, counts as broken.
    is_broken = mask & ~((logprobs > MISSING_LOGPROB) & (logprobs <= MAX_LOGPROB_ROUNDING))
    if not bool(is_broken.any()):
        return
    # NaN first, then what lies farthest from 0; -1 keeps sound positions out.
    badness = torch.where(is_broken, logprobs.abs().nan_to_num(nan=torch.inf, posinf=3e38), -1.0)
    position = int(badness.argmax())
    raise DivergenceError(
        f"{name} at position {position}: expected a number in ({MISSING_LOGPROB:g}, 0], got "
        f"{logprobs[position].item()} ({int(is_broken.sum())} of {int(mask.sum())} kept tokens are "
        f"broken); look for NaN in the weights or logits of the engine that computed it"
    )


def discrepancy_metrics(
    recomputed_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    weight_versions: torch.Tensor,
    current_version: int,
) -> dict[str, Metric]:
    """Sums of this micro-batch, in float64, to be reduced over micro-batches, DP and CP ranks.

    Args:
        recomputed_logprobs, rollout_logprobs: [T] float32.
        mask: [T] bool, every response token that was sampled.
        weight_versions: [T] int64, version of the weights that sampled the token.
        current_version: of the weights that recomputed; age = current_version - weight_versions.

    Returns:
        With `rho = p_train / p_inf`, log-ratios clamped to +-20 before exp:
        `discrepancy/mean`, `discrepancy/max`, and `discrepancy` (a histogram): delta;
        `discrepancy/age_0/mean`, `.../age_1/mean`, `.../age_2_plus/mean`: delta by age, and
        `discrepancy/age/mean`;
        `discrepancy/probability_difference/mean`: p_train - p_inf, signed;
        `discrepancy/log_ratio/mean`: log rho, unclamped;
        `discrepancy/kl_k1/mean`, `discrepancy/kl_k3/mean`: -log rho and rho - 1 - log rho,
        estimates of KL(p_inf || p_train) in nats; `discrepancy/mult_prob_error/mean`: exp|log rho|,
        1 where the engines agree. The keys are the same for every input, an empty mask included.
    """
    for name, tensor in (
        ("recomputed_logprobs", recomputed_logprobs),
        ("rollout_logprobs", rollout_logprobs),
        ("weight_versions", weight_versions),
    ):
        if tensor.shape != mask.shape:
            raise ValueError(
                f"discrepancy_metrics: expected {name} of the mask's shape {tuple(mask.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    recomputed = recomputed_logprobs.detach()[mask].double()
    rollout = rollout_logprobs.detach()[mask].double()
    age = current_version - weight_versions[mask]
    # The float32 delta that shapes the advantages, so that the mean is of the same numbers.
    delta = discrepancy(recomputed, rollout).double()
    log_ratio = recomputed - rollout
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    everything = torch.ones_like(age, dtype=torch.bool)
    # What is averaged, and over which tokens.
    averaged = {
        "discrepancy/mean": (delta, everything),
        "discrepancy/age_0/mean": (delta, age <= 0),
        "discrepancy/age_1/mean": (delta, age == 1),
        "discrepancy/age_2_plus/mean": (delta, age >= 2),
        "discrepancy/age/mean": (age.double(), everything),
        "discrepancy/probability_difference/mean": (recomputed.exp() - rollout.exp(), everything),
        "discrepancy/log_ratio/mean": (log_ratio, everything),
        "discrepancy/kl_k1/mean": (-clamped, everything),
        "discrepancy/kl_k3/mean": (torch.expm1(clamped) - clamped, everything),
        "discrepancy/mult_prob_error/mean": (clamped.abs().exp(), everything),
    }
    metrics: dict[str, Metric] = {
        name: Mean(
            sum=torch.where(is_counted, values, 0.0).sum(),
            count=is_counted.sum(dtype=torch.float64),
        )
        for name, (values, is_counted) in averaged.items()
    }
    metrics["discrepancy/max"] = Max(delta.max() if delta.numel() else -math.inf)
    metrics["discrepancy"] = Histogram.of(delta, edges=HISTOGRAM_EDGES)
    return metrics
