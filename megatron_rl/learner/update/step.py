"""The RL update under the constraint on the discrepancy: updates the weights and lambda with one
batch.

For every kept token, with the lambda from before this step (DCMDP, arXiv 2606.08779):

    delta = |p_recomputed - p_rollout|,   A' = A - lambda * delta,   loss = surrogate of A'

then `lambda <- clip(lambda + eta * (mean delta - tolerance))`. Other signals and penalties are
options (row_penalty.py). The mean is over every sampled token of the global batch, including tokens
that a correction rejects (row_correction.py) and the tokens of dropped samples
(`TrainBatch.dropped`). Its sum and count are added over rows and data-parallel ranks and sent from
the last pipeline stage to the others, so that lambda is the same on every rank.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TypeVar

import torch

from megatron_rl.config.objective import ConstraintConfig, ObjectiveConfig
from megatron_rl.errors import BrokenUpdateError, DivergenceError
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.update.row_balance import balance_scales, needs_separate_pass
from megatron_rl.learner.update.row_correction import (
    BatchScalars,
    batch_scalars,
    needs_batch_scalars,
)
from megatron_rl.learner.update.row_loss import (
    MiniBatchLoss,
    RowResult,
    StepSettings,
    UpdateRow,
    dropped_results,
)
from megatron_rl.learner.update.row_penalty import UNIT_SHARE
from megatron_rl.objective.constraint import DualVariable, penalty_ceiling
from megatron_rl.objective.discrepancy import DiscrepancySum
from megatron_rl.observe.metrics import merge, reduce
from megatron_rl.records import MicroBatch, RecomputedRow, StepReport, TrainBatch

Item = TypeVar("Item")


def train_step(
    learner: Learner,
    batch: TrainBatch,
    dual: DualVariable,
    config: ObjectiveConfig,
    *,
    step: int,
    weight_version: int,
    should_recompute: bool,
) -> tuple[StepReport, tuple[RecomputedRow, ...]]:
    """One optimizer step for each mini-batch, then one dual step. A collective over all ranks.

    A mini-batch without a kept token on any rank takes no optimizer step; the metric
    `learner/num_skipped_updates` counts them, and `learner/grad_norm` is the mean of the others. A
    mini-batch with a number that is not finite, on any rank, takes none either;
    `learner/num_broken_updates` counts them, and none takes one if a log-prob of the passes before
    the updates cannot be computed. Then there is no dual step, and the report has neither
    figures of the gap nor of the loss.

    Args:
        dual: lambda; this function updates it, unless the constraint is off.
        weight_version: version of the learner's current weights; the age of a rollout is counted
            from it.
        should_recompute: run a separate forward pass for `recomputed_logprobs` even if it could be
            skipped. It can be skipped in two cases: with one mini-batch, because before the first
            optimizer step the policy's log-probs result from the same arithmetic and are the same
            bits; and under bypass, where the policy's log-probs in the update of the row's
            mini-batch are used instead. It is never skipped if the loss needs sums of the whole
            batch before its first backward pass.
    Returns:
        The report, the same on every rank; and, on the last pipeline stage, the rows of all
        mini-batches followed by the dropped rows, with their recomputed log-probs (empty on the
        other stages).
    """
    is_enabled = config.constraint.enabled
    dual_value = _dual_value(dual, batch, config.constraint, learner.parallel)
    is_separate = should_recompute or _needs_separate_pass(learner, batch, config)
    mini_batches, dropped, of_passes = _passes(learner, batch, is_separate)
    results: list[RowResult] = []
    grad_norms: list[float] = []
    problems, of_dropped = [of_passes] * len(mini_batches), ""
    if not of_passes:
        scalars = _scalars(learner, mini_batches, dropped, config, dual)
        is_gated = config.constraint.gate == "mean"
        settings = StepSettings(
            config=config,
            dual_value=0.0 if is_gated and not scalars.is_gate_open else dual_value,
            tolerance=dual.tolerance,
            scalars=scalars,
            weight_version=weight_version,
            place=f"step {step}, rank {learner.parallel.rank}",
        )
        results, grad_norms, problems = _updates(
            learner, mini_batches, batch.num_left_out, settings
        )
        results_of_dropped, of_dropped = _dropped_results(dropped, settings, learner.parallel)
        results += results_of_dropped
    num_skipped = len(mini_batches) - len(grad_norms) - len(problems)
    metrics = learner.take_router_metrics() | {
        "constraint/lambda": dual_value,
        "learner/learning_rate": learner.learning_rate,
        "learner/num_skipped_updates": float(num_skipped),
        "learner/num_broken_updates": float(len(problems)),
    }
    if grad_norms:
        metrics["learner/grad_norm"] = sum(grad_norms) / len(grad_norms)
    problem = next(filter(None, [*problems, of_dropped]), "")
    if problem:
        metrics["constraint/next_lambda"] = dual.effective_value if is_enabled else 0.0
    else:
        of_rows, gap = _over_all_ranks(results, learner.parallel)
        metrics |= of_rows | _dual_step(dual, gap, config.constraint, of_rows.get(UNIT_SHARE))
    report = StepReport(step=step, dual_value=dual.value, metrics=metrics, problem=problem)
    return report, () if problem else tuple(row.recomputed for row in results)


def _dual_value(
    dual: DualVariable, batch: TrainBatch, constraint: ConstraintConfig, parallel: Parallel
) -> float:
    """Lambda in this step: 0 without a constraint, and its lower bound if the penalty may only be a
    share of advantages that are all 0.
    """
    if not constraint.enabled:
        return 0.0
    if constraint.max_penalty_share is None:
        return dual.effective_value
    rows = chain.from_iterable(batch.mini_batches)
    largest = [row.advantages.where(row.loss_mask, 0.0).abs().max().cpu() for row in rows]
    own = torch.stack([torch.zeros(()), *largest]).max().double()
    has_advantage = bool(parallel.batch_reducer()(own, "max") > 0)
    return dual.effective_value if has_advantage else min(dual.effective_value, dual.minimum)


def _passes(
    learner: Learner, batch: TrainBatch, is_separate: bool
) -> tuple[list[list[UpdateRow]], list[RecomputedRow], str]:
    """The rows of each mini-batch with what is known before the updates, the recomputed dropped
    rows, and why a log-prob cannot be computed, or "". Every rank runs all passes, whatever happens
    in them, and all get the same reason.
    """
    problems: list[str] = []

    def rows_of(passed: Callable[[], list[Item]]) -> list[Item]:
        try:
            return passed()
        except DivergenceError as error:
            problems.append(str(error))
            return []

    mini_batches = [
        _update_rows(learner, rows, rows_of, is_separate=is_separate) for rows in batch.mini_batches
    ]
    dropped = rows_of(partial(learner.recompute, batch.dropped))
    own = problems[0] if problems else ""
    return mini_batches, dropped, learner.parallel.first_problem(own)


def _scalars(
    learner: Learner,
    mini_batches: Sequence[Sequence[UpdateRow]],
    dropped: Sequence[RecomputedRow],
    config: ObjectiveConfig,
    dual: DualVariable,
) -> BatchScalars:
    """The means over the batch, if the loss needs them."""
    if not needs_batch_scalars(config) or not learner.parallel.is_last_stage:
        return BatchScalars()
    known = [row.recomputed for row in chain(*mini_batches)]
    return batch_scalars(known, dropped, config, learner.parallel, tolerance=dual.tolerance)


def _updates(
    learner: Learner,
    mini_batches: Sequence[Sequence[UpdateRow]],
    num_left_out: Sequence[int],
    settings: StepSettings,
) -> tuple[list[RowResult], list[float], list[str]]:
    """An optimizer step for each mini-batch: the results of the rows, the gradient's norms of the
    steps, and why mini-batches were left out that a number is not finite in.
    """
    config = settings.config
    results: list[RowResult] = []
    grad_norms, problems = [], []
    for rows, left_out in zip(mini_batches, num_left_out, strict=True):
        known = [(row.micro_batch, row.recomputed) for row in rows]
        try:
            of_rows, grad_norm = learner.update(
                [row.micro_batch for row in rows],
                MiniBatchLoss(rows, settings, num_left_out=left_out),
                has_entropy_gradient=config.entropy_coefficient > 0,
                balance=balance_scales(
                    known, learner.moe, config, learner.parallel, num_left_out=left_out
                ),
            )
        except BrokenUpdateError as error:  # on every rank
            problems.append(str(error))
            continue
        results += of_rows
        if grad_norm is not None:
            grad_norms.append(grad_norm)
    return results, grad_norms, problems


def _dropped_results(
    rows: Sequence[RecomputedRow], settings: StepSettings, parallel: Parallel
) -> tuple[list[RowResult], str]:
    """The gap of the rows on which the learner does not train; or nothing, and the problem, if a
    log-prob of any rank is not finite.
    """
    results, own = [], ""
    try:
        results = dropped_results(rows, settings)
    except DivergenceError as error:
        own = str(error)
    problem = parallel.first_problem(own)
    return [] if problem else results, problem


def _needs_separate_pass(learner: Learner, batch: TrainBatch, config: ObjectiveConfig) -> bool:
    """Whether the recomputed log-probs cannot be those of the update."""
    is_update_off_policy = len(batch.mini_batches) > 1 and config.old_policy == "recomputed"
    return (
        is_update_off_policy
        or needs_batch_scalars(config)
        or needs_separate_pass(learner.moe, config)
    )


def _update_rows(
    learner: Learner,
    micro_batches: Sequence[MicroBatch],
    rows_of: Callable[[Callable[[], list]], list],
    *,
    is_separate: bool,
) -> list[UpdateRow]:
    """The rows of a mini-batch with the log-probs of the separate pass and of the reference policy,
    if there are any. Both are None on all pipeline stages but the last.

    Args:
        rows_of: calls a pass, and returns nothing if it failed.
    """
    nothing = [None] * len(micro_batches)
    recomputed = []
    if is_separate:
        recomputed = rows_of(partial(learner.recompute, micro_batches, is_for_update=True))
    reference = rows_of(partial(learner.reference_logprobs, micro_batches))
    return [
        UpdateRow(micro_batch=row, recomputed=known, reference_logprobs=of_reference)
        for row, known, of_reference in zip(
            micro_batches,
            recomputed or nothing,
            [row.full_logprobs for row in reference] or nothing,
            strict=True,
        )
    ]


def _dual_step(
    dual: DualVariable,
    gap: DiscrepancySum,
    constraint: ConstraintConfig,
    unit_share: float | None,
) -> dict[str, float]:
    """Update lambda, or calibrate its tolerance; return the metrics of both. The tolerance of
    another signal than the discrepancy has another name, because it cannot be compared with
    `discrepancy/mean`.

    Args:
        unit_share: the step's penalty for a lambda of 1, as a share of |A|; None or NaN: unknown.
    """
    is_enabled = constraint.enabled
    if is_enabled:
        # The mean is NaN if the batch has no sampled token; the dual step then raises an error.
        dual.update(gap.mean, ceiling=penalty_ceiling(constraint.max_penalty_share, unit_share))
    metrics = {"constraint/next_lambda": dual.effective_value if is_enabled else 0.0}
    if dual.calibration is not None:
        metrics["constraint/is_at_rest"] = float(dual.is_at_rest)
    if not dual.is_at_rest:
        is_discrepancy = constraint.measure == "probability"
        prefix = "constraint" if is_discrepancy else "constraint/signal"
        metrics[f"{prefix}/tolerance"] = dual.tolerance
        if dual.fresh_gap is not None:
            metrics[f"{prefix}/fresh_gap"] = dual.fresh_gap.value
    if is_enabled and dual.watch is not None:
        metrics |= dual.watch.metrics()
    return metrics


def _over_all_ranks(
    results: Sequence[RowResult], parallel: Parallel
) -> tuple[dict[str, float], DiscrepancySum]:
    """The metrics of all rows of all ranks, and the discrepancy sum for the dual step. Both are the
    same on every rank.
    """
    if not parallel.is_last_stage:
        return parallel.from_last_stage(None)
    all_reduce = parallel.batch_reducer()
    metrics = reduce(merge(row.metrics for row in results), all_reduce)
    gap = functools.reduce(operator.add, (row.discrepancy for row in results))
    total, num_tokens = all_reduce(torch.stack([gap.total, gap.num_tokens]).cpu(), "sum")
    return parallel.from_last_stage((metrics, DiscrepancySum(total=total, num_tokens=num_tokens)))
