"""A batch in, new weights and a new lambda out: the RL update with the discrepancy under its
constraint.

For every kept token, with lambda from before this step (DCMDP, arXiv 2606.08779):

    delta = |p_recomputed - p_rollout|,   A' = A - lambda * delta,   loss = surrogate of A'

then `lambda <- clip(lambda + eta * (mean delta - tolerance))` from the mean over the global batch,
over every token that was sampled: whatever a correction keeps of it (row_loss.py), and also of
dropped groups and responses (`TrainBatch.measured`). The sums are added over micro-batches and
data-parallel ranks and sent from the last pipeline stage to the others, so that lambda is the same
number on every rank.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.config import ObjectiveConfig
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.update.row_correction import (
    BatchScalars,
    batch_scalars,
    needs_batch_scalars,
)
from megatron_rl.learner.update.row_loss import (
    MiniBatchLoss,
    RowResult,
    StepSettings,
    measured_rows,
)
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.observe.metrics import Metric, merge, reduce
from megatron_rl.records import StepReport, TrainBatch


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
        should_recompute: a forward pass of its own for `recomputed_logprobs` also where it can be
            saved: with one mini-batch, as the policy's log-probs before the first step are the same
            arithmetic and the same bits; and under bypass, where the policy's of the mini-batch
            that a sequence is in are taken. What needs sums of the whole batch before its first
            backward pass always has the pass.
    Returns:
        The report, the same on every rank; and `recomputed_logprobs`, a [T] a row a part of the
        batch, on the last stage.
    Raises:
        DivergenceError: a log-prob, the loss or the gradient's norm is not finite.
    """
    is_enabled = config.constraint.enabled
    penalty = dual.penalty if is_enabled else 0.0
    recomputed: list[list[torch.Tensor]] = [[] for _ in batch.mini_batches]
    is_update_off_policy = len(batch.mini_batches) > 1 and config.old_policy == "recomputed"
    if should_recompute or is_update_off_policy or needs_batch_scalars(config):
        recomputed = [learner.recompute(rows) for rows in batch.mini_batches]
    measured = learner.recompute(batch.measured)
    reference = [learner.reference_logprobs(rows) for rows in batch.mini_batches]
    scalars = BatchScalars()
    if needs_batch_scalars(config) and learner.parallel.is_last_stage:
        scalars = batch_scalars(
            batch, recomputed, measured, config, learner.parallel, tolerance=dual.tolerance
        )
    is_gated = config.constraint.gate == "mean"
    settings = StepSettings(
        config=config,
        penalty=0.0 if is_gated and not scalars.is_gate_open else penalty,
        tolerance=dual.tolerance,
        scalars=scalars,
        weight_version=weight_version,
        place=f"step {step}, rank {learner.parallel.rank}",
    )
    results: list[list[RowResult]] = []
    grad_norms = []
    for number, (rows, known, of_reference) in enumerate(
        zip(batch.mini_batches, recomputed, reference, strict=True)
    ):
        loss = MiniBatchLoss(rows, known, of_reference, settings, is_before_update=number == 0)
        row_results, grad_norm = learner.update(
            rows, loss, has_entropy_gradient=config.entropy_coefficient > 0
        )
        results.append(row_results)
        grad_norms.append(grad_norm)
    if batch.measured:
        results.append(measured_rows(batch.measured, measured, settings))
    metrics = _global_metrics(learner, [row.metrics for rows in results for row in rows])
    metrics |= {
        "constraint/lambda": penalty,
        "learner/grad_norm": sum(grad_norms) / len(grad_norms),
        "learner/learning_rate": learner.learning_rate,
    }
    metrics |= _dual_step(dual, metrics, is_enabled=is_enabled)
    report = StepReport(step=step, dual_value=dual.value, metrics=metrics)
    return report, [[row.recomputed_logprobs for row in rows] for rows in results]


def _dual_step(
    dual: DualVariable, metrics: dict[str, float], *, is_enabled: bool
) -> dict[str, float]:
    """Step lambda, or measure its tolerance, and tell of it."""
    if is_enabled:
        # Without a sampled token in the whole batch there is no mean, and the dual step says so.
        dual.update(metrics.get("discrepancy/mean", math.nan))
    found = {"constraint/next_lambda": dual.penalty if is_enabled else 0.0}
    if dual.measured is not None:
        found["constraint/is_at_rest"] = float(dual.is_at_rest)
    if not dual.is_at_rest:
        found["constraint/tolerance"] = dual.tolerance
    return found


def _global_metrics(learner: Learner, of_rows: list[dict[str, Metric]]) -> dict[str, float]:
    """The metrics of all rows of all ranks, the same floats on every rank."""
    parallel = learner.parallel
    reduced = reduce(merge(of_rows), parallel.reducer()) if parallel.is_last_stage else {}
    return parallel.from_last_stage(reduced)
