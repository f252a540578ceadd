"""Computes the loss of one packed row from the model's output for it. Megatron's schedule calls it
on the last pipeline stage.

There are two masks. The row's `loss_mask` covers every sampled response token; the discrepancy and
the dual step use it. `kept` covers the tokens that remain after rejection and veto; the loss uses
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_rl.config.objective import ObjectiveConfig
from megatron_rl.errors import DivergenceError
from megatron_rl.learner.passes.forward import LossTerms, RowOutput
from megatron_rl.learner.update.row_centering import center_row
from megatron_rl.learner.update.row_correction import (
    BatchScalars,
    RowCorrection,
    correct_row,
    weights_of_tokens,
)
from megatron_rl.learner.update.row_penalty import constrained_sum, penalise
from megatron_rl.objective.discrepancy import DiscrepancySum, check_logprobs
from megatron_rl.objective.gap_metrics import discrepancy_metrics
from megatron_rl.objective.importance import weight_metrics
from megatron_rl.objective.inputs import LossInputs
from megatron_rl.objective.normalize import normalized_sum
from megatron_rl.objective.policy import policy_loss_named
from megatron_rl.objective.policy_loss import policy_loss
from megatron_rl.objective.regularizers import reference_kl, reference_metrics
from megatron_rl.objective.rejection import off_policy_sequence_mask, rejection_metrics
from megatron_rl.observe.metrics import Mean, Metric
from megatron_rl.records import MicroBatch, RecomputedRow


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRow:
    """A row of a mini-batch with the log-probs that are known before its update.

    Example of a row without a reference policy and without a separate recompute pass:
    `UpdateRow(micro_batch=MicroBatch(...), recomputed=None, reference_logprobs=None)`.
    """

    micro_batch: MicroBatch
    # None: there was no separate pass. The policy's log-probs in the update are used instead.
    # Before the first optimizer step they are the same bits; under bypass every update uses them.
    recomputed: RecomputedRow | None
    reference_logprobs: torch.Tensor | None  # [T] float32; None: no reference policy


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """The results of one row on the last pipeline stage. Example: `RowResult(
    recomputed=RecomputedRow(...), discrepancy=DiscrepancySum(...), metrics={...})`.
    """

    recomputed: RecomputedRow
    discrepancy: DiscrepancySum  # of the constrained signal, for the dual step
    metrics: dict[str, Metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """The settings that all rows of a step share. Example: `StepSettings(config=ObjectiveConfig(),
    dual_value=0.1, tolerance=0.0037, scalars=BatchScalars(), weight_version=11, place="step 12,
    rank 0")`.
    """

    config: ObjectiveConfig
    dual_value: float  # lambda, or 0 if nothing is penalised in this step
    tolerance: float
    scalars: BatchScalars
    weight_version: int  # of the weights before the update
    place: str  # step and rank, for messages


class MiniBatchLoss:
    """The loss function of one mini-batch: `(row index, output) -> LossTerms`."""

    def __init__(
        self, rows: Sequence[UpdateRow], settings: StepSettings, *, num_left_out: int
    ) -> None:
        """
        Args:
            rows: in the order of the mini-batch.
            num_left_out: see `TrainBatch`.
        Raises:
            ConfigError: `objective.policy_loss` does not name a policy loss.
        """
        self._rows = rows
        self._settings = settings
        self._num_left_out = num_left_out
        self._surrogate = policy_loss_named(settings.config.policy_loss)

    def __call__(self, index: int, output: RowOutput) -> LossTerms:
        """The loss of one row; its result is a `RowResult`.

        Raises:
            DivergenceError: a log-prob or the loss is not finite.
        """
        row, config = self._rows[index], self._settings.config
        micro_batch, recomputed = row.micro_batch, row.recomputed
        if recomputed is None:
            recomputed = output.recomputed_row(micro_batch)
        _check(recomputed, f"{self._settings.place}, row {index}")
        correction = correct_row(recomputed, config)
        per_token, metrics = self._per_token(recomputed, output, row.reference_logprobs, correction)
        total, count = normalized_sum(
            per_token,
            correction.kept,
            micro_batch.sequence_ids,
            normalize=config.normalize,
            # What is left out is in no row of the mini-batch; the first one counts it.
            num_sampled=len(micro_batch.samples) + (self._num_left_out if index == 0 else 0),
            length=config.normalize_length,
        )
        if not bool(torch.isfinite(total)):
            raise DivergenceError(
                f"{self._settings.place}, row {index}: expected a finite loss, got {total.item()}; "
                "worst token at position "
                f"{int(per_token.detach().abs().argmax())}; lower learner.optimizer.learning_rate"
            )
        gap, of_gap = _gap_metrics(recomputed, self._settings)
        metrics |= correction.metrics | of_gap
        metrics["loss/mean"] = Mean(sum=total.item(), count=int(count))
        return LossTerms(
            total=total,
            count=count,
            num_kept=int(correction.kept.sum()),
            result=RowResult(recomputed=recomputed, discrepancy=gap, metrics=metrics),
        )

    def _per_token(
        self,
        row: RecomputedRow,
        output: RowOutput,
        reference: torch.Tensor | None,
        correction: RowCorrection,
    ) -> tuple[torch.Tensor, dict[str, Metric]]:
        """The loss of every token, which is 0 for tokens that are not kept, and the metrics."""
        config, kept = self._settings.config, correction.kept
        is_bypass = config.old_policy == "rollout"
        old = row.micro_batch.rollout_logprobs if is_bypass else row.recomputed_logprobs
        settings = self._settings
        penalty = penalise(
            row,
            output.logprobs,
            kept,
            config.constraint,
            dual_value=settings.dual_value,
            tolerance=settings.tolerance,
            baseline=settings.scalars.baseline,
        )
        advantages, metrics = penalty.advantages, penalty.metrics
        if reference is not None:
            metrics |= reference_metrics(output.full_logprobs, reference, kept)
            if config.kl.estimator == "k1":
                policy = output.full_logprobs.detach()
                gap = reference_kl(policy, reference, kept, estimator="k1")
                advantages = advantages - config.kl.coefficient * gap
        stays, of_opsm = self._opsm_mask(row.micro_batch, output, kept)
        weights, of_weights = self._weights(correction, stays)
        metrics |= of_weights | of_opsm
        inputs = LossInputs.of(
            policy_logprobs=output.logprobs,
            old_logprobs=old,
            advantages=advantages,
            mask=kept,
            sequence_ids=row.micro_batch.sequence_ids,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            ratio_cap=config.ratio_bound,
            dual_clip=config.dual_clip,
        )
        per_token, of_loss = policy_loss(
            self._surrogate,
            inputs,
            weights=weights,
            entropy=output.entropy.detach(),
            old_policy=config.old_policy,
        )
        if config.score_centering.enabled:
            scored = inputs if stays is None else replace(inputs, mask=kept & stays)
            of_tokens = weights_of_tokens(config.importance, settings.scalars)
            centering, of_centering = center_row(self._surrogate, scored, row, output, of_tokens)
            per_token, metrics = per_token + centering, metrics | of_centering
        if penalty.term is not None:
            per_token = per_token + penalty.term
        if reference is not None and config.kl.coefficient > 0 and config.kl.estimator != "k1":
            policy = output.full_logprobs
            kl = reference_kl(policy, reference, kept, estimator=config.kl.estimator)
            per_token = per_token + config.kl.coefficient * kl
        if config.entropy_coefficient > 0:
            bonus = config.entropy_coefficient * torch.where(kept, output.entropy, 0.0)
            per_token = per_token - bonus
        return per_token, metrics | of_loss

    def _opsm_mask(
        self, micro_batch: MicroBatch, output: RowOutput, kept: torch.Tensor
    ) -> tuple[torch.Tensor | None, dict[str, Metric]]:
        """The tokens [T] that OPSM does not mask; None: it is off."""
        threshold = self._settings.config.rejection.opsm_threshold
        if threshold is None:
            return None, {}
        stays = off_policy_sequence_mask(
            output.logprobs,
            micro_batch.rollout_logprobs,
            micro_batch.advantages,
            micro_batch.loss_mask,
            micro_batch.sequence_ids,
            threshold=threshold,
        )
        ids = micro_batch.sequence_ids
        return stays, rejection_metrics(stays, kept, ids, name="opsm_masked")

    def _weights(
        self, correction: RowCorrection, stays: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, dict[str, Metric]]:
        """The factor of the surrogate: the importance weights, and 0 where OPSM masks a token."""
        weights, metrics = correction.weights, {}
        if weights is not None and self._settings.config.importance.batch_normalize:
            weights = weights / self._settings.scalars.weight_mean
        if weights is not None:
            metrics = weight_metrics(weights, correction.is_outside, correction.kept)
        if stays is not None:
            weights = stays.float() if weights is None else torch.where(stays, weights, 0.0)
        return weights, metrics


def dropped_results(rows: Iterable[RecomputedRow], settings: StepSettings) -> list[RowResult]:
    """The gap of the rows on which the learner does not train.

    Raises:
        DivergenceError: a log-prob is not finite.
    """
    results = []
    for index, row in enumerate(rows):
        _check(row, f"{settings.place}, dropped row {index}")
        gap, metrics = _gap_metrics(row, settings)
        results.append(RowResult(recomputed=row, discrepancy=gap, metrics=metrics))
    return results


def _gap_metrics(
    row: RecomputedRow, settings: StepSettings
) -> tuple[DiscrepancySum, dict[str, Metric]]:
    """The gap of every sampled token of the row, and the share of them outside the support."""
    micro_batch = row.micro_batch
    gap, metrics = discrepancy_metrics(
        row.recomputed_logprobs,
        micro_batch.rollout_logprobs,
        micro_batch.loss_mask,
        micro_batch.weight_versions,
        settings.weight_version,
        sequence_ids=micro_batch.sequence_ids,
        num_sequences=micro_batch.cu_seqlens.numel() - 1,
    )
    is_outside = row.is_outside_support & micro_batch.loss_mask
    metrics["discrepancy/outside_support/mean"] = Mean(
        sum=is_outside.sum(dtype=torch.float64),
        count=micro_batch.loss_mask.sum(dtype=torch.float64),
    )
    signal, of_signal = constrained_sum(row, settings.config.constraint, gap)
    return signal, metrics | of_signal


def _check(row: RecomputedRow, place: str) -> None:
    for name, logprobs in (
        ("recomputed", row.recomputed_logprobs),
        ("rollout", row.micro_batch.rollout_logprobs),
    ):
        try:
            check_logprobs(logprobs, row.micro_batch.loss_mask, name=f"{name} log-prob")
        except DivergenceError as error:
            raise DivergenceError(f"{place}: {error}") from error
