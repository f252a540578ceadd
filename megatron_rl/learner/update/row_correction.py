"""Log-probs of a row and the settings in, what of it stays and what it weighs out; and the numbers
of the whole step that a row's loss needs before the first backward pass.

The rules stand in `objective/`; here they are put together, and the sums of the global batch are
added over the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rl.config import ConstraintConfig, ObjectiveConfig
from megatron_rl.errors import DivergenceError
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.objective.constraint import gated_discrepancy
from megatron_rl.objective.discrepancy import discrepancy
from megatron_rl.objective.importance import importance_weights, weight_mean
from megatron_rl.objective.rejection import rejection_mask, rejection_metrics, veto_mask
from megatron_rl.observe.metrics import Metric
from megatron_rl.records import MicroBatch, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCorrection:
    """Example: a row of three sampled tokens whose last one was rejected: `RowCorrection(
    kept=[True, True, False], weights=[0.9, 1.1, 1.3], is_outside=[False] * 3, metrics={...})`.
    """

    kept: torch.Tensor  # [T] bool, what the loss is over
    weights: torch.Tensor | None  # [T] float32, not yet batch-normalised; None: 1
    is_outside: torch.Tensor | None  # [T] bool, the weight was bounded; None without weights
    metrics: dict[str, Metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchScalars:
    """The same on every rank that has a loss. Example: `BatchScalars(weight_mean=0.97,
    is_gate_open=True)`.
    """

    weight_mean: float = 1.0  # of the global batch's kept weights
    is_gate_open: bool = True  # the penalty acts in this step
    baseline: float = 0.0  # what a token's penalised gap is counted from


def needs_batch_scalars(config: ObjectiveConfig) -> bool:
    """Whether a row's loss waits for sums of the global batch, and so for a recomputation."""
    constraint = config.constraint
    is_constrained = constraint.gate == "mean" or constraint.baseline == "batch"
    return config.importance.batch_normalize or (constraint.enabled and is_constrained)


def correct_row(
    row: MicroBatch, recomputed: torch.Tensor, config: ObjectiveConfig
) -> RowCorrection:
    """Rejection, veto and importance weights of one row.

    Args:
        recomputed: [T] float32, `recomputed_logprobs`.
    """
    rejection, importance = config.rejection, config.importance
    rollout, sampled, ids = row.rollout_logprobs, row.loss_mask, row.sequence_ids
    kept, metrics = sampled, {}
    if rejection.divergence != "none":
        stays = rejection_mask(
            recomputed,
            rollout,
            sampled,
            ids,
            divergence=rejection.divergence,
            level=rejection.level,
            lower=rejection.lower,
            upper=rejection.upper,
        )
        metrics |= rejection_metrics(stays, sampled, ids, name="rejected")
        kept = kept & stays
    if rejection.veto_ratio > 0 or rejection.veto_probability > 0:
        stays = veto_mask(
            recomputed,
            rollout,
            sampled,
            ids,
            ratio=rejection.veto_ratio,
            probability=rejection.veto_probability,
        )
        metrics |= rejection_metrics(stays, sampled, ids, name="vetoed")
        kept = kept & stays
    weights = is_outside = None
    if importance.level != "none":
        weights, is_outside = importance_weights(
            recomputed,
            rollout,
            sampled,
            ids,
            level=importance.level,
            mode=importance.mode,
            lower=importance.lower,
            upper=importance.upper,
        )
    return RowCorrection(kept=kept, weights=weights, is_outside=is_outside, metrics=metrics)


def batch_scalars(
    batch: TrainBatch,
    recomputed: Sequence[Sequence[torch.Tensor]],
    measured: Sequence[torch.Tensor],
    config: ObjectiveConfig,
    parallel: Parallel,
    *,
    tolerance: float,
) -> BatchScalars:
    """Means over every row of the step on every data-parallel rank; a collective of the last stage.

    Args:
        recomputed: a [T] a row a mini-batch.
        measured: a [T] a row that only the gap is measured on.
        tolerance: c; what the mean gap is held against, for the gate "mean".

    Raises:
        DivergenceError: a batch without any response token, on every rank.
    """
    sums = torch.zeros(6, dtype=torch.float64)
    for rows, of_rows in zip(batch.mini_batches, recomputed, strict=True):
        for row, logprobs in zip(rows, of_rows, strict=True):
            gap = discrepancy(logprobs, row.rollout_logprobs)
            correction = correct_row(row, logprobs, config)
            sums[:2] += _sum_and_count(gap, row.loss_mask)
            penalised = penalised_gap(gap, config.constraint, tolerance=tolerance)
            sums[4:] += _sum_and_count(penalised, correction.kept)
            if correction.weights is not None:
                mean = weight_mean(
                    correction.weights,
                    correction.kept,
                    row.sequence_ids,
                    level=config.importance.level,
                )
                sums[2] += float(mean.sum)
                sums[3] += float(mean.count)
    for row, logprobs in zip(batch.measured, measured, strict=True):
        sums[:2] += _sum_and_count(discrepancy(logprobs, row.rollout_logprobs), row.loss_mask)
    is_centered = config.constraint.enabled and config.constraint.baseline == "batch"
    reduced = parallel.reducer()(sums, "sum").tolist()
    gap_sum, gap_count, weight_sum, weight_count, penalised_sum, kept_count = reduced
    if gap_count == 0:
        raise DivergenceError("training step: expected a response token in the batch, got none")
    return BatchScalars(
        # Nothing kept, or nothing that weighs: there is nothing to normalise.
        weight_mean=weight_sum / weight_count if weight_sum > 0 else 1.0,
        is_gate_open=gap_sum / gap_count > tolerance,
        baseline=penalised_sum / kept_count if is_centered and kept_count else 0.0,
    )


def penalised_gap(
    gap: torch.Tensor, constraint: ConstraintConfig, *, tolerance: float
) -> torch.Tensor:
    """What the constraint takes of a token's gap [T], under gradient where the gap is."""
    return gated_discrepancy(
        gap, gate=constraint.gate, tolerance=tolerance, maximum=constraint.max_discrepancy
    )


def _sum_and_count(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[2] float64 on the CPU: the sum of values [T] where the mask is True, and their number."""
    kept = values[mask].double()
    return torch.stack([kept.sum(), kept.new_tensor(kept.numel())]).cpu()
