"""A batch in, new weights and a new lambda out: the RL update with the discrepancy under its
constraint.

For every kept token, with lambda from before this step (design: DCMDP, arXiv 2606.08779):

    delta = |p_recomputed - p_rollout|,   A' = A - lambda * delta,   loss = clipped surrogate of A'

then `lambda <- clip(lambda + eta * (mean delta - tolerance))` from the mean over the global batch.
The sums are added over micro-batches and data-parallel ranks and sent from the last pipeline stage
to the others, so that lambda is the same number on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rl.config import ObjectiveConfig
from megatron_rl.errors import DivergenceError
from megatron_rl.learner.forward import RowOutput
from megatron_rl.learner.learner import Learner
from megatron_rl.objective.constraint import DualVariable, shape_advantages
from megatron_rl.objective.discrepancy import (
    check_logprobs,
    discrepancy,
    discrepancy_metrics,
)
from megatron_rl.objective.loss import policy_loss
from megatron_rl.objective.normalize import normalized_sum
from megatron_rl.observe.metrics import Mean, Metric, merge, reduce
from megatron_rl.records import MicroBatch, StepReport, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What one row of a mini-batch gave on the last pipeline stage."""

    recomputed_logprobs: torch.Tensor  # [T] float32, 0 where the loss mask is False
    metrics: dict[str, Metric]


def train_step(
    learner: Learner,
    batch: TrainBatch,
    dual: DualVariable,
    config: ObjectiveConfig,
    *,
    step: int,
    weight_version: int,
    should_recompute: bool,
) -> tuple[StepReport, list[list[torch.Tensor]]]:
    """One optimizer step for each mini-batch, then one dual step. A collective over all ranks.

    Args:
        dual: lambda; stepped here, unless the constraint is off.
        weight_version: of the learner's present weights, which the ages of the rollouts are counted
            from.
        should_recompute: a forward pass of its own for `recomputed_logprobs`. With one mini-batch
            it can be saved: the policy's log-probs before the first step are the same arithmetic
            and the same bits.
    Returns:
        The report, the same on every rank; and `recomputed_logprobs`, a [T] a row a mini-batch, on
        the last stage.
    Raises:
        DivergenceError: a log-prob, the loss or the gradient's norm is not finite.
    """
    dual_value = dual.value if config.constraint.enabled else 0.0
    recomputed: list[list[torch.Tensor]] = [[] for _ in batch.mini_batches]
    if should_recompute or len(batch.mini_batches) > 1:
        recomputed = [learner.recompute(rows) for rows in batch.mini_batches]
    results: list[list[RowResult]] = []
    grad_norms = []
    for number, (rows, known) in enumerate(zip(batch.mini_batches, recomputed, strict=True)):
        loss = _RowLoss(
            rows,
            known,
            dual_value,
            config,
            weight_version,
            f"step {step}, rank {learner.parallel.rank}",
            is_before_update=number == 0,
        )
        row_results, grad_norm = learner.update(rows, loss)
        results.append(row_results)
        grad_norms.append(grad_norm)
    metrics = _global_metrics(learner, [row.metrics for rows in results for row in rows])
    if config.constraint.enabled:
        # Without a kept token in the whole batch there is no mean, and the dual step says so.
        dual.update(metrics.get("discrepancy/mean", math.nan))
    metrics |= {
        "constraint/lambda": dual_value,
        "constraint/next_lambda": dual.value if config.constraint.enabled else 0.0,
        "constraint/tolerance": config.constraint.tolerance,
        "learner/grad_norm": sum(grad_norms) / len(grad_norms),
        "learner/learning_rate": learner.learning_rate,
    }
    report = StepReport(step=step, dual_value=dual.value, metrics=metrics)
    return report, [[row.recomputed_logprobs for row in rows] for rows in results]


class _RowLoss:
    """The loss of one row, given its output; called by Megatron's schedule on the last stage."""

    def __init__(
        self,
        rows: Sequence[MicroBatch],
        recomputed: Sequence[torch.Tensor],
        dual_value: float,
        config: ObjectiveConfig,
        weight_version: int,
        place: str,
        *,
        is_before_update: bool,
    ) -> None:
        self._rows = rows
        self._recomputed = recomputed
        self._dual_value = dual_value
        self._config = config
        self._weight_version = weight_version
        self._place = place
        self._is_before_update = is_before_update

    def __call__(
        self, index: int, output: RowOutput
    ) -> tuple[torch.Tensor, torch.Tensor, RowResult]:
        row, config = self._rows[index], self._config
        recomputed = self._recomputed[index] if self._recomputed else output.logprobs.detach()
        self._check(index, recomputed, row.rollout_logprobs)
        delta = discrepancy(recomputed, row.rollout_logprobs)
        shaped = shape_advantages(row.advantages, delta, self._dual_value)
        per_token, metrics = policy_loss(
            output.logprobs,
            recomputed,
            shaped,
            row.loss_mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            entropy=output.entropy,
        )
        total, count = normalized_sum(
            per_token, row.loss_mask, row.sequence_ids, normalize=config.normalize
        )
        if not bool(torch.isfinite(total)):
            raise DivergenceError(
                f"{self._place}, row {index}: expected a finite loss, got {total.item()}; worst "
                "token at position "
                f"{int(per_token.detach().abs().argmax())}; lower learner.optimizer.learning_rate"
            )
        metrics |= discrepancy_metrics(
            recomputed,
            row.rollout_logprobs,
            row.loss_mask,
            row.weight_versions,
            self._weight_version,
        )
        metrics |= self._support_metrics(row, output)
        metrics["loss/mean"] = Mean(sum=total.item(), count=int(count))
        return total, count, RowResult(recomputed_logprobs=recomputed, metrics=metrics)

    def _support_metrics(self, row: MicroBatch, output: RowOutput) -> dict[str, Metric]:
        """Tokens outside the support at the weights before the update; after it, they are so
        because the policy has moved.
        """
        is_counted = row.loss_mask if self._is_before_update else row.loss_mask & False
        num_outside = (output.is_outside_support & is_counted).sum()
        return {
            "discrepancy/outside_support/mean": Mean(
                sum=int(num_outside), count=int(is_counted.sum())
            )
        }

    def _check(self, index: int, recomputed: torch.Tensor, rollout_logprobs: torch.Tensor) -> None:
        mask = self._rows[index].loss_mask
        for name, logprobs in (("recomputed", recomputed), ("rollout", rollout_logprobs)):
            try:
                check_logprobs(logprobs, mask, name=f"{name} log-prob")
            except DivergenceError as error:
                raise DivergenceError(f"{self._place}, row {index}: {error}") from error


def _global_metrics(learner: Learner, of_rows: list[dict[str, Metric]]) -> dict[str, float]:
    """The metrics of all rows of all ranks, the same floats on every rank."""
    parallel = learner.parallel
    reduced = reduce(merge(of_rows), parallel.reducer()) if parallel.is_last_stage else {}
    return parallel.from_last_stage(reduced)
