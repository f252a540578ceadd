"""Computes the constraint's part of one row: the signal of every token, its sum for the dual step,
and the penalty, which is a part of the advantages or a term of the loss.

The formulas are in `objective/`. This module applies them as `objective.constraint` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.config.objective import ConstraintConfig
from megatron_rl.objective.constraint import gated_discrepancy, shape_advantages
from megatron_rl.objective.discrepancy import DiscrepancySum, constrained_signal
from megatron_rl.objective.penalty import differentiable_penalty
from megatron_rl.observe.metrics import Mean, Metric
from megatron_rl.records import RecomputedRow

UNIT_SHARE = "constraint/unit_penalty_share/mean"  # the metric that max_penalty_share bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPenalty:
    """The effect of the constraint on the loss of a row.

    Example of two tokens with lambda 0.4 and signals 0.25 and 0, shaped: `RowPenalty(
    advantages=[0.9, 1.0], term=None, metrics={...})`.
    """

    advantages: torch.Tensor  # [T] float32, shaped by the constraint or as they were
    term: torch.Tensor | None  # [T] float32, added to the loss, under gradient; None: shaping
    metrics: dict[str, Metric]


def signal_of(row: RecomputedRow, constraint: ConstraintConfig) -> torch.Tensor:
    """The constrained signal of every token of a row, [T] float32."""
    return constrained_signal(
        row.recomputed_logprobs, row.micro_batch.rollout_logprobs, measure=constraint.measure
    )


def penalised_part(
    signal: torch.Tensor, constraint: ConstraintConfig, *, tolerance: float
) -> torch.Tensor:
    """The penalised part of every token's signal, [T]; under gradient if the signal is."""
    return gated_discrepancy(
        signal, gate=constraint.gate, tolerance=tolerance, maximum=constraint.max_discrepancy
    )


def penalise(
    row: RecomputedRow,
    policy_logprobs: torch.Tensor,
    kept: torch.Tensor,
    constraint: ConstraintConfig,
    *,
    dual_value: float,
    tolerance: float,
    baseline: float,
) -> RowPenalty:
    """The penalty of the kept tokens.

    Args:
        policy_logprobs: [T] float32, under gradient. kept: [T] bool.
        dual_value: lambda, or 0 if nothing is penalised in this step.
        tolerance: c, for gate=token. baseline: subtracted from a token's signal by shaping.
    """
    micro_batch = row.micro_batch
    is_shaped = constraint.penalty == "shaping"
    gap = (
        signal_of(row, constraint)
        if is_shaped
        else differentiable_penalty(
            policy_logprobs, micro_batch.rollout_logprobs, kept, form=constraint.penalty
        )
    )
    penalised = penalised_part(gap, constraint, tolerance=tolerance)
    metrics: dict[str, Metric] = {}
    if constraint.enabled:
        of_tokens = penalised.detach()[kept].double()
        total = of_tokens.sum()
        all_advantages = micro_batch.advantages[kept].double().abs().sum()
        metrics = {
            "constraint/penalty/mean": Mean(sum=dual_value * total, count=of_tokens.numel()),
            # The sum of lambda * delta, without the baseline, divided by the sum of |A|: the
            # weight of the constraint relative to the reward; and what it is for a lambda of 1.
            "constraint/penalty_share/mean": Mean(sum=dual_value * total, count=all_advantages),
            UNIT_SHARE: Mean(sum=total, count=all_advantages),
        }
    if not is_shaped:
        term = dual_value * penalised
        return RowPenalty(advantages=micro_batch.advantages, term=term, metrics=metrics)
    shaped = shape_advantages(micro_batch.advantages, penalised - baseline, dual_value)
    return RowPenalty(advantages=shaped, term=None, metrics=metrics)


def constrained_sum(
    row: RecomputedRow, constraint: ConstraintConfig, gap: DiscrepancySum
) -> tuple[DiscrepancySum, dict[str, Metric]]:
    """The sum of the constrained signal over the sampled tokens, for the dual step.

    Args:
        gap: the row's sum of |p_train - p_inf|.

    Returns:
        `gap` itself if it is what the constraint is about, and no metric; else the sum of the other
        signal, and its mean, `constraint/signal/mean`.
    """
    if constraint.measure == "probability":
        return gap, {}
    total = signal_of(row, constraint)[row.micro_batch.loss_mask].double().sum()
    signal = DiscrepancySum(total=total, num_tokens=gap.num_tokens)
    return signal, {"constraint/signal/mean": Mean(sum=total, count=gap.num_tokens)}
