"""Rules that reject tokens, or whole sequences, on which learner and engine differ too much. They
compute a mask of the kept tokens from the log-probs of both.

With `rho = p_train / p_inf`, per token (Schulman 2020, verl's rollout correction):

    k1 = -log rho,   k2 = (log rho)^2 / 2,   k3 = rho - 1 - log rho

With level=token each token is judged alone. With a sequence level all tokens of a sequence are
rejected if the sum, the mean or the largest of its values is out of bounds. The bounds of k1 are
given as ratios, lower <= exp(-k1) <= upper, as in verl and the papers (geometric: sequence_mean
with 0.999 to 1.001); k2 and k3 have only an upper bound, in nats.

A rejected token counts neither in the numerator nor in the denominator of the loss, but it still
counts in the mean discrepancy.
"""

from __future__ import annotations

import math
from typing import get_args

import torch

from megatron_rl.config.choices import KLEstimator, RejectionLevel
from megatron_rl.errors import ConfigError
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO, log_ratios
from megatron_rl.objective.sequences import (
    max_by_sequence,
    mean_by_sequence,
    sum_by_sequence,
    to_tokens,
)
from megatron_rl.observe.metrics import Mean, Metric

DIVERGENCES = get_args(KLEstimator)
LEVELS = get_args(RejectionLevel)


def rejection_mask(
    recomputed_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    *,
    divergence: str,
    level: str,
    lower: float,
    upper: float,
) -> torch.Tensor:
    """The mask of the sampled tokens that a rule keeps.

    Args:
        recomputed_logprobs, rollout_logprobs: [T] float32.
        mask: [T] bool, every response token that was sampled.
        sequence_ids: [T] int64, 0 to S-1, -1 on padding; whole sequences.
        divergence, level: see the docstring of this module.
        lower, upper: for k1 the bounds of the ratio, 0 <= lower <= 1 <= upper; for k2 and k3 only
            `upper` is used, in nats.

    Returns:
        [T] bool, False where the mask is False.
    """
    log_ratio = log_ratios(recomputed_logprobs, rollout_logprobs, mask)
    if divergence == "k1":
        log_lower = math.log(lower) if lower > 0 else -math.inf
        values, low, high = log_ratio, log_lower, math.log(upper)
    elif divergence == "k2":
        values, low, high = log_ratio.square() / 2, -math.inf, upper
    elif divergence == "k3":
        clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        values, low, high = torch.expm1(clamped) - clamped, -math.inf, upper
    else:
        raise ConfigError(
            f"objective.rejection.divergence: expected one of {', '.join(DIVERGENCES)}, "
            f"got {divergence!r}"
        )
    if level == "token":
        return mask & (values >= low) & (values <= high)
    if level == "sequence_max":  # judged by the token with the largest deviation
        is_outside = (values < low) | (values > high)
        has_outside = max_by_sequence(is_outside, mask, sequence_ids) > 0
        return mask & ~to_tokens(has_outside, sequence_ids)
    if level not in LEVELS:
        raise ConfigError(
            f"objective.rejection.level: expected one of {', '.join(LEVELS)}, got {level!r}"
        )
    reduction = sum_by_sequence if level == "sequence_sum" else mean_by_sequence
    of_sequences = reduction(values, mask, sequence_ids)
    return mask & to_tokens((of_sequences >= low) & (of_sequences <= high), sequence_ids)


def veto_mask(
    recomputed_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    *,
    ratio: float,
    probability: float,
) -> torch.Tensor:
    """Reject a whole sequence if it contains a token that the learner would hardly have chosen.

    Args:
        ratio: a token with p_train / p_inf below this value is a veto (verl, slime: 1e-4); 0: off.
        probability: a token with p_train below this value is a veto; 0: off.

    Returns:
        [T] bool, False where the mask is False.
    """
    log_ratio = log_ratios(recomputed_logprobs, rollout_logprobs, mask)
    is_vetoed = torch.zeros_like(mask)
    if ratio > 0:
        is_vetoed |= log_ratio < math.log(ratio)
    if probability > 0:
        is_vetoed |= recomputed_logprobs.detach() < math.log(probability)
    has_veto = max_by_sequence(is_vetoed, mask, sequence_ids) > 0
    return mask & ~to_tokens(has_veto, sequence_ids)


def off_policy_sequence_mask(
    policy_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    *,
    threshold: float,
) -> torch.Tensor:
    """Off-policy sequence masking (OPSM, DeepSeek-V3.2, arXiv 2512.02556, eq. 9): masks a sequence
    with a negative advantage if the policy is far from the engine that sampled it, that is, if
    `mean(log p_inf - log p_theta) > threshold`. The mean contains the gap between learner and
    engine, the age of the weights, and the updates of earlier mini-batches.

    Args:
        policy_logprobs, rollout_logprobs: [T] float32; no gradient flows through them.
        advantages: [T] float32, the group's, before any shaping.
        mask: [T] bool, every response token that was sampled; the mean is over all of a sequence.

    Returns:
        [T] bool, False where the mask is False.
    """
    log_ratio = log_ratios(rollout_logprobs, policy_logprobs, mask)
    is_far = to_tokens(mean_by_sequence(log_ratio, mask, sequence_ids) > threshold, sequence_ids)
    return mask & ~(is_far & (advantages < 0))


def rejection_metrics(
    kept: torch.Tensor, mask: torch.Tensor, sequence_ids: torch.Tensor, *, name: str
) -> dict[str, Metric]:
    """The shares of tokens and sequences that a rule rejected.

    Returns:
        `correction/<name>_tokens/mean`, the share of sampled tokens that the rule does not keep;
        `correction/<name>_sequences/mean`, the share of sequences that lost at least one token,
        among those with a sampled token.
    """
    is_taken = mask & ~kept
    has_tokens = max_by_sequence(mask, mask, sequence_ids) > 0
    has_lost = max_by_sequence(is_taken, mask, sequence_ids) > 0
    return {
        f"correction/{name}_tokens/mean": Mean(
            sum=is_taken.sum(dtype=torch.float64), count=mask.sum(dtype=torch.float64)
        ),
        f"correction/{name}_sequences/mean": Mean(
            sum=has_lost.sum(dtype=torch.float64), count=has_tokens.sum(dtype=torch.float64)
        ),
    }
