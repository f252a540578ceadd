"""Computes the correction of one row, that is, which tokens are kept and their weights, and the
scalars of the whole step that the loss of a row needs before the first backward pass.

The rules are implemented in `objective/`. This module applies them in the configured order, and
reduces the sums of the global batch over the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rl.config.correction import ImportanceConfig
from megatron_rl.config.objective import ObjectiveConfig
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.update.row_penalty import penalised_part, signal_of
from megatron_rl.objective.importance import cis_bound, importance_weights, weight_mean
from megatron_rl.objective.rejection import rejection_mask, rejection_metrics, veto_mask
from megatron_rl.objective.score_centering import TokenWeights
from megatron_rl.observe.metrics import Metric
from megatron_rl.records import RecomputedRow


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCorrection:
    """The kept tokens of a row and their weights.

    Example: a row of three sampled tokens whose last one was rejected: `RowCorrection(
    kept=[True, True, False], weights=[0.9, 1.1, 1.3], is_outside=[False] * 3, metrics={...})`.
    """

    kept: torch.Tensor  # [T] bool, the tokens that count in the loss
    weights: torch.Tensor | None  # [T] float32, not yet batch-normalised; None: all weights are 1
    is_outside: torch.Tensor | None  # [T] bool, the weight was bounded; None without weights
    metrics: dict[str, Metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchScalars:
    """Scalars of the global batch, the same on every rank that computes a loss. Example:
    `BatchScalars(weight_mean=0.97, is_gate_open=True)`.
    """

    weight_mean: float = 1.0  # mean of the global batch's kept weights
    is_gate_open: bool = True  # whether the penalty acts in this step
    baseline: float = 0.0  # subtracted from the gap of every penalised token


def needs_batch_scalars(config: ObjectiveConfig) -> bool:
    """Whether the loss of a row needs sums of the global batch and therefore a separate recompute
    pass.
    """
    constraint = config.constraint
    is_constrained = constraint.gate == "mean" or constraint.baseline == "batch"
    return config.importance.batch_normalize or (constraint.enabled and is_constrained)


def correct_row(row: RecomputedRow, config: ObjectiveConfig) -> RowCorrection:
    """Apply rejection, veto and importance weights to one row."""
    rejection, importance = config.rejection, config.importance
    micro_batch = row.micro_batch
    sampled, ids = micro_batch.loss_mask, micro_batch.sequence_ids
    tokens = (row.recomputed_logprobs, micro_batch.rollout_logprobs, sampled, ids)
    kept, metrics = sampled, {}
    if rejection.divergence != "none":
        stays = rejection_mask(
            *tokens,
            divergence=rejection.divergence,
            level=rejection.level,
            lower=rejection.lower,
            upper=rejection.upper,
        )
        metrics |= rejection_metrics(stays, sampled, ids, name="rejected")
        kept = kept & stays
    if rejection.veto_ratio > 0 or rejection.veto_probability > 0:
        stays = veto_mask(
            *tokens,
            ratio=rejection.veto_ratio,
            probability=rejection.veto_probability,
        )
        metrics |= rejection_metrics(stays, sampled, ids, name="vetoed")
        kept = kept & stays
    weights = is_outside = None
    if importance.level != "none":
        weights, is_outside = bounded_weights(*tokens, importance)
    return RowCorrection(kept=kept, weights=weights, is_outside=is_outside, metrics=metrics)


def bounded_weights(
    recomputed_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    importance: ImportanceConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`importance_weights` with the bounds of the settings, whose level is not "none"."""
    upper: float | torch.Tensor = importance.upper
    if importance.mode == "cis":
        slope, floor = importance.cis_slope, importance.cis_floor
        upper = cis_bound(recomputed_logprobs, slope=slope, floor=floor)
    return importance_weights(
        recomputed_logprobs,
        rollout_logprobs,
        mask,
        sequence_ids,
        level=importance.level,
        mode=importance.mode,
        lower=importance.lower,
        upper=upper,
    )


def weights_of_tokens(importance: ImportanceConfig, scalars: BatchScalars) -> TokenWeights | None:
    """The importance weights of the settings, whose level is that of a token, as a function of any
    tokens' old and rollout log-probs; None: all weights are 1.
    """
    if importance.level == "none":
        return None

    def weights(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> torch.Tensor:
        everything = torch.ones_like(old_logprobs, dtype=torch.bool)
        one_sequence = torch.zeros_like(everything, dtype=torch.int64)
        found, _ = bounded_weights(
            old_logprobs, rollout_logprobs, everything, one_sequence, importance
        )
        return found / scalars.weight_mean if importance.batch_normalize else found

    return weights


def batch_scalars(
    rows: Sequence[RecomputedRow],
    dropped: Sequence[RecomputedRow],
    config: ObjectiveConfig,
    parallel: Parallel,
    *,
    tolerance: float,
) -> BatchScalars:
    """Means over all rows of the step on all data-parallel ranks. A collective over the
    data-parallel ranks of the last stage.

    Args:
        rows: of all mini-batches, in order.
        dropped: rows that count only in the mean of the constrained signal.
        tolerance: c; the gate "mean" compares that mean with it.
    """
    sums = torch.zeros(6, dtype=torch.float64)
    for row in rows:
        signal, correction = signal_of(row, config.constraint), correct_row(row, config)
        sums[:2] += _sum_and_count(signal, row.micro_batch.loss_mask)
        penalised = penalised_part(signal, config.constraint, tolerance=tolerance)
        sums[4:] += _sum_and_count(penalised, correction.kept)
        if correction.weights is not None:
            mean = weight_mean(
                correction.weights,
                correction.kept,
                row.micro_batch.sequence_ids,
                level=config.importance.level,
            )
            sums[2] += float(mean.sum)
            sums[3] += float(mean.count)
    for row in dropped:
        signal = signal_of(row, config.constraint)
        sums[:2] += _sum_and_count(signal, row.micro_batch.loss_mask)
    is_centered = config.constraint.enabled and config.constraint.baseline == "batch"
    reduced = parallel.batch_reducer()(sums, "sum").tolist()
    signal_sum, signal_count, weight_sum, weight_count, penalised_sum, kept_count = reduced
    return BatchScalars(
        # Without a kept token, or if all weights are 0, there is nothing to normalise.
        weight_mean=weight_sum / weight_count if weight_sum > 0 else 1.0,
        is_gate_open=signal_count > 0 and signal_sum / signal_count > tolerance,
        baseline=penalised_sum / kept_count if is_centered and kept_count else 0.0,
    )


def _sum_and_count(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[2] float64 on the CPU: the sum and the number of the values [T] where the mask is True."""
    kept = values[mask].double()
    return torch.stack([kept.sum(), kept.new_tensor(kept.numel())]).cpu()
