"""The loss of one packed row, given its output: what Megatron's schedule calls on the last stage.

Two masks: `loss_mask` of the row, every response token that was sampled, which the discrepancy and
the dual step are over; and `kept`, what rejection and veto leave of it, which the loss is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rl.config import ObjectiveConfig
from megatron_rl.errors import DivergenceError
from megatron_rl.learner.passes.forward import RowOutput
from megatron_rl.learner.update.row_correction import (
    BatchScalars,
    RowCorrection,
    correct_row,
    penalised_gap,
)
from megatron_rl.objective.constraint import probability_gap, shape_advantages
from megatron_rl.objective.discrepancy import check_logprobs, discrepancy
from megatron_rl.objective.gap_metrics import discrepancy_metrics
from megatron_rl.objective.importance import weight_metrics
from megatron_rl.objective.loss import policy_loss
from megatron_rl.objective.normalize import normalized_sum
from megatron_rl.objective.regularizers import reference_kl, reference_metrics
from megatron_rl.objective.rejection import off_policy_sequence_mask, rejection_metrics
from megatron_rl.observe.metrics import Mean, Metric
from megatron_rl.records import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What one row of a mini-batch gave on the last pipeline stage."""

    recomputed_logprobs: torch.Tensor  # [T] float32, 0 where the loss mask is False
    metrics: dict[str, Metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What is the same for every row of a step. Example: `StepSettings(config=ObjectiveConfig(),
    penalty=0.1, tolerance=0.0037, scalars=BatchScalars(), weight_version=11, place="step 12,
    rank 0")`.
    """

    config: ObjectiveConfig
    penalty: float  # lambda, or 0 where nothing is penalised in this step
    tolerance: float
    scalars: BatchScalars
    weight_version: int  # of the weights before the update
    place: str  # for messages


class MiniBatchLoss:
    """`(index of the row, its output) -> (sum, count, RowResult)` for one mini-batch."""

    def __init__(
        self,
        rows: Sequence[MicroBatch],
        recomputed: Sequence[torch.Tensor],
        reference: Sequence[torch.Tensor],
        settings: StepSettings,
        *,
        is_before_update: bool,
    ) -> None:
        """
        Args:
            recomputed: a [T] a row; empty: the policy's own, detached, are the same bits before
                the first optimizer step, and stand in for them under bypass.
            reference: a [T] a row; empty: no reference policy.
            is_before_update: no optimizer step of this batch has been done.
        """
        self._rows = rows
        self._recomputed = recomputed
        self._reference = reference
        self._settings = settings
        self._is_before_update = is_before_update

    def __call__(
        self, index: int, output: RowOutput
    ) -> tuple[torch.Tensor, torch.Tensor, RowResult]:
        row, config = self._rows[index], self._settings.config
        recomputed = self._recomputed[index] if self._recomputed else output.logprobs.detach()
        reference = self._reference[index] if self._reference else None
        _check(row, recomputed, f"{self._settings.place}, row {index}")
        correction = correct_row(row, recomputed, config)
        per_token, metrics = self._per_token(row, output, recomputed, reference, correction)
        total, count = normalized_sum(
            per_token,
            correction.kept,
            row.sequence_ids,
            normalize=config.normalize,
            sampled=row.loss_mask,
            length=config.normalize_length,
        )
        if not bool(torch.isfinite(total)):
            raise DivergenceError(
                f"{self._settings.place}, row {index}: expected a finite loss, got {total.item()}; "
                "worst token at position "
                f"{int(per_token.detach().abs().argmax())}; lower learner.optimizer.learning_rate"
            )
        metrics |= correction.metrics | _gap_metrics(row, recomputed, self._settings)
        metrics |= self._support_metrics(row, output)
        metrics["loss/mean"] = Mean(sum=total.item(), count=int(count))
        return total, count, RowResult(recomputed_logprobs=recomputed, metrics=metrics)

    def _support_metrics(self, row: MicroBatch, output: RowOutput) -> dict[str, Metric]:
        """Tokens outside the support at the weights before the update; after it, they are so
        because the policy has moved.
        """
        is_counted = row.loss_mask if self._is_before_update else row.loss_mask & False
        is_outside = output.is_outside_support & is_counted
        return {
            "discrepancy/outside_support/mean": Mean(
                sum=is_outside.sum(dtype=torch.float64), count=is_counted.sum(dtype=torch.float64)
            )
        }

    def _per_token(
        self,
        row: MicroBatch,
        output: RowOutput,
        recomputed: torch.Tensor,
        reference: torch.Tensor | None,
        correction: RowCorrection,
    ) -> tuple[torch.Tensor, dict[str, Metric]]:
        """The loss of every token, 0 where it is not kept, and its metrics."""
        config, kept = self._settings.config, correction.kept
        old = row.rollout_logprobs if config.old_policy == "rollout" else recomputed
        advantages, penalty, metrics = self._penalised(row, output, recomputed, kept)
        if reference is not None:
            metrics |= reference_metrics(output.full_logprobs, reference, kept)
            if config.kl.estimator == "k1":
                policy = output.full_logprobs.detach()
                gap = reference_kl(policy, reference, kept, estimator="k1")
                advantages = advantages - config.kl.coefficient * gap
        weights, of_weights = self._weights(row, output, old, correction)
        per_token, of_loss = policy_loss(
            output.logprobs,
            old,
            advantages,
            kept,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kind=config.policy_loss,
            sequence_ids=row.sequence_ids,
            weights=weights,
            entropy=output.entropy.detach(),
        )
        if penalty is not None:
            per_token = per_token + penalty
        if reference is not None and config.kl.coefficient > 0 and config.kl.estimator != "k1":
            policy = output.full_logprobs
            kl = reference_kl(policy, reference, kept, estimator=config.kl.estimator)
            per_token = per_token + config.kl.coefficient * kl
        if config.entropy_coefficient > 0:
            bonus = config.entropy_coefficient * torch.where(kept, output.entropy, 0.0)
            per_token = per_token - bonus
        return per_token, metrics | of_weights | of_loss

    def _penalised(
        self, row: MicroBatch, output: RowOutput, recomputed: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Metric]]:
        """The constraint's share: shaped advantages, or a term [T] of the loss."""
        settings, constraint = self._settings, self._settings.config.constraint
        measured = discrepancy(recomputed, row.rollout_logprobs)
        gap = penalised_gap(measured, constraint, tolerance=settings.tolerance)
        metrics: dict[str, Metric] = {}
        if constraint.enabled:
            taken = settings.penalty * gap[kept].double()
            metrics = {
                "constraint/penalty/mean": Mean(sum=taken.sum(), count=taken.numel()),
                # sum of lambda * delta over sum of |A|, with a baseline too: how much the
                # constraint has to say
                "constraint/penalty_share/mean": Mean(
                    sum=taken.sum(), count=row.advantages[kept].double().abs().sum()
                ),
            }
        if constraint.penalty == "shaping":
            centered = gap - settings.scalars.baseline
            return shape_advantages(row.advantages, centered, settings.penalty), None, metrics
        moved = probability_gap(output.logprobs, row.rollout_logprobs, kept)
        taken = penalised_gap(moved, constraint, tolerance=settings.tolerance)
        return row.advantages, settings.penalty * taken, metrics

    def _weights(
        self, row: MicroBatch, output: RowOutput, old: torch.Tensor, correction: RowCorrection
    ) -> tuple[torch.Tensor | None, dict[str, Metric]]:
        """What multiplies the surrogate: importance weights, and 0 where OPSM masks."""
        config, kept, weights = self._settings.config, correction.kept, correction.weights
        metrics: dict[str, Metric] = {}
        if weights is not None and config.importance.batch_normalize:
            weights = weights / self._settings.scalars.weight_mean
        if weights is not None:
            metrics |= weight_metrics(weights, correction.is_outside, kept)
        threshold = config.rejection.opsm_threshold
        if threshold is not None:
            stays = off_policy_sequence_mask(
                output.logprobs, old, row.advantages, kept, row.sequence_ids, threshold=threshold
            )
            metrics |= rejection_metrics(stays, kept, row.sequence_ids, name="opsm_masked")
            weights = stays.float() if weights is None else torch.where(stays, weights, 0.0)
        return weights, metrics


def measured_rows(
    rows: Sequence[MicroBatch], recomputed: Sequence[torch.Tensor], settings: StepSettings
) -> list[RowResult]:
    """The gap of rows that nothing is learnt from.

    Args:
        recomputed: a [T] a row; empty on all but the last pipeline stage.
    """
    results = []
    for index, (row, logprobs) in enumerate(zip(rows, recomputed)):
        _check(row, logprobs, f"{settings.place}, measured row {index}")
        metrics = _gap_metrics(row, logprobs, settings)
        results.append(RowResult(recomputed_logprobs=logprobs, metrics=metrics))
    return results


def _gap_metrics(
    row: MicroBatch, recomputed: torch.Tensor, settings: StepSettings
) -> dict[str, Metric]:
    return discrepancy_metrics(
        recomputed,
        row.rollout_logprobs,
        row.loss_mask,
        row.weight_versions,
        settings.weight_version,
        sequence_ids=row.sequence_ids,
        num_sequences=row.cu_seqlens.numel() - 1,
    )


def _check(row: MicroBatch, recomputed: torch.Tensor, place: str) -> None:
    for name, logprobs in (("recomputed", recomputed), ("rollout", row.rollout_logprobs)):
        try:
            check_logprobs(logprobs, row.loss_mask, name=f"{name} log-prob")
        except DivergenceError as error:
            raise DivergenceError(f"{place}: {error}") from error
