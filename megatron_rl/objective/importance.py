"""Computes importance weights of the kept tokens from recomputed and rollout log-probs.

    rho[t] = p_train[t] / p_inf[t]
    token:          rho[t]
    sequence_sum:   product of the sequence's rho (sum of log-ratios), on each of its tokens
    sequence_mean:  geometric mean of the sequence's rho (mean of log-ratios), on each of its tokens

The weights are then bounded: `truncate` clips them to [lower, upper], `mask` sets weights outside
the bounds to 0, and `cis` truncates each token's weight at a bound of its own:

    cis:  min(rho[t], 1 + slope * max(1 - p_train[t], floor))

The weight multiplies a token's surrogate and has no gradient; a masked token still counts as a kept
one. Sources: truncated importance sampling is token, truncate, upper 2 (Yao et al. 2025, verl);
IcePop is token, mask, 0.5 to 5 (arXiv 2510.18855); TRL's sequence mask is sequence_sum, mask, upper
3; CIS is token, cis, slope 2.3, floor 5e-3 (arXiv 2609.32444). If engine and learner differ by e in
the log-odds of a token, then rho - 1 = (exp(e) - 1) (1 - p_train), so above the floor CIS bounds e
at log(1 + slope), whatever the confidence. Other libraries call a level "sequence": verl and TRL
mean the sum, ms-swift means the mean.
"""

from __future__ import annotations

import math
from typing import get_args

import torch

from megatron_rl.config.choices import ImportanceLevel, ImportanceMode
from megatron_rl.errors import ConfigError
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO, log_ratios
from megatron_rl.objective.sequences import (
    max_by_sequence,
    mean_by_sequence,
    sum_by_sequence,
    to_tokens,
)
from megatron_rl.observe.metrics import Figures, Mean, Metric

LEVELS = get_args(ImportanceLevel)
MODES = get_args(ImportanceMode)


def importance_weights(
    recomputed_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    *,
    level: str,
    mode: str,
    lower: float,
    upper: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the bounded weights.

    Args:
        recomputed_logprobs, rollout_logprobs: [T] float32.
        mask: [T] bool, every response token that was sampled.
        sequence_ids: [T] int64, 0 to S-1, -1 on padding; whole sequences.
        level, mode: see the docstring of this module.
        lower, upper: 0 <= lower <= 1 <= upper. With mode "cis", upper is the bound of every token,
            [T] float64, from `cis_bound`.

    Returns:
        The weights, [T] float32, exactly 1 where p_train = p_inf and 0 where the mask is False; and
        [T] bool, True where the weight was outside the bounds before it was bounded.
    """
    log_ratio = log_ratios(recomputed_logprobs, rollout_logprobs, mask)
    if level == "sequence_sum":
        log_ratio = to_tokens(sum_by_sequence(log_ratio, mask, sequence_ids), sequence_ids)
    elif level == "sequence_mean":
        log_ratio = to_tokens(mean_by_sequence(log_ratio, mask, sequence_ids), sequence_ids)
    elif level != "token":
        raise ConfigError(
            f"objective.importance.level: expected one of {', '.join(LEVELS)}, got {level!r}"
        )
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    is_outside = mask & ((ratio < lower) | (ratio > upper))
    if mode == "truncate":
        weights = ratio.clamp(lower, upper)
    elif mode == "cis":
        weights = torch.where(is_outside, upper, ratio)
    elif mode == "mask":
        weights = torch.where(is_outside, 0.0, ratio)
    else:
        raise ConfigError(
            f"objective.importance.mode: expected one of {', '.join(MODES)}, got {mode!r}"
        )
    return torch.where(mask, weights, 0.0).float(), is_outside


def cis_bound(recomputed_logprobs: torch.Tensor, *, slope: float, floor: float) -> torch.Tensor:
    """The upper bound of mode "cis" for every token, `1 + slope * max(1 - p_train, floor)`.

    Args:
        recomputed_logprobs: [T] float32. slope, floor: at least 0; floor at most 1.

    Returns:
        [T] float64, from 1 + slope * floor for a certain token to 1 + slope; no gradient.
    """
    # 1 - p is computed directly, because p itself would lose these digits near p = 1.
    rest = -torch.expm1(recomputed_logprobs.detach().double())
    return 1.0 + slope * rest.clamp(min=floor)


def weight_mean(
    weights: torch.Tensor, kept: torch.Tensor, sequence_ids: torch.Tensor, *, level: str
) -> Mean:
    """Sum and count of the kept weights; batch normalisation divides by their global mean.

    Args:
        weights: [T] float32, from `importance_weights`. kept: [T] bool.
        level: at a sequence level, every sequence with a kept token counts once, as in verl.
    """
    if level == "token":
        values = weights[kept].double()
    else:
        values = max_by_sequence(weights, kept, sequence_ids)
        values = values[values.isfinite()]
    return Mean(sum=values.sum(), count=values.numel())


def weight_metrics(
    weights: torch.Tensor, is_outside: torch.Tensor, kept: torch.Tensor
) -> dict[str, Metric]:
    """Metrics of the kept tokens' weights, as they multiply the surrogate.

    Returns:
        `correction/weight`, reported as `correction/weight/mean`, `/std`, `/min`, `/max`,
        `correction/effective_sample_size` (of the tokens' weights, as a share of the tokens), and
        `correction/outside_bounds/mean`, the share of weights that were bounded.
    """
    values = torch.where(kept, weights.detach().double(), 1.0)
    # Sums of weight - 1, so that the variance keeps its digits when all weights are close to 1.
    excess = values - 1.0
    sums = (kept.double(), excess, excess.square(), (is_outside & kept).double())
    maxima = [torch.where(kept, each, -math.inf).amax() for each in (values, -values)]
    return {
        "correction/weight": Figures(
            sum_names=("tokens", "excess", "excess^2", "outside"),
            sums=torch.stack([each.sum() for each in sums]),
            max_names=("weight", "-weight"),
            maxima=torch.stack(maxima),
            finish=_finish_weights,
        )
    }


def _finish_weights(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """The figures of `weight_metrics`; empty if there is no kept token."""
    count = sums["tokens"]
    if not count:
        return {}
    excess, square = sums["excess"] / count, sums["excess^2"] / count
    mean_square = 1.0 + 2.0 * excess + square
    figures = {
        "weight/mean": 1.0 + excess,
        "weight/std": math.sqrt(max(0.0, square - excess * excess)),
        "weight/min": -maxima["-weight"],
        "weight/max": maxima["weight"],
        "outside_bounds/mean": sums["outside"] / count,
    }
    if mean_square > 0:
        figures["effective_sample_size"] = (1.0 + excess) ** 2 / mean_square
    return {f"correction/{name}": value for name, value in figures.items()}
