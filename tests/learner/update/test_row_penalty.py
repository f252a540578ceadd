"""The constraint's part of one row: numbers worked by hand.

p_train = 1/2, 1/4, 1/2 and p_inf = 1/4, 1/4, 5/8 on three sampled tokens; the fourth is masked.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from megatron_rl.config import ConstraintConfig
from megatron_rl.config.choices import Measure, Penalty
from megatron_rl.learner.update.row_penalty import (
    UNIT_SHARE,
    RowPenalty,
    constrained_sum,
    penalise,
    signal_of,
)
from megatron_rl.objective.discrepancy import DiscrepancySum
from megatron_rl.observe.metrics import reduce

TRAIN = torch.tensor([0.5, 0.25, 0.5, 1.0]).log()
MASK = torch.tensor([True, True, True, False])
NOTHING = torch.zeros(4, dtype=torch.bool)
LOG2, LOG125 = math.log(2), math.log(1.25)


def row_of(mask: torch.Tensor = MASK) -> Any:
    """What the functions read of a RecomputedRow."""
    rollout = torch.tensor([0.25, 0.25, 0.625, 1.0]).log()
    advantages = torch.tensor([1.0, 1.0, -2.0, 0.0])
    micro_batch = SimpleNamespace(rollout_logprobs=rollout, advantages=advantages, loss_mask=mask)
    return SimpleNamespace(recomputed_logprobs=TRAIN, micro_batch=micro_batch)


def penalise_row(
    constraint: ConstraintConfig,
    policy: torch.Tensor = TRAIN,
    kept: torch.Tensor = MASK,
    *,
    baseline: float = 0.0,
) -> RowPenalty:
    """With lambda 0.4 and a tolerance of 0.1."""
    return penalise(
        row_of(kept), policy, kept, constraint, dual_value=0.4, tolerance=0.1, baseline=baseline
    )


def close(*numbers: float) -> Any:
    return pytest.approx(list(numbers), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("measure", "signal"),
    [
        ("probability", (0.25, 0.0, 0.125)),
        ("ratio", (1.0, 0.0, 0.2)),
        ("log_ratio", (LOG2, 0.0, LOG125)),
    ],
)
def test_every_signal_shapes(measure, signal):
    first, _, last = signal
    constraint = ConstraintConfig(measure=measure)
    assert signal_of(row_of(), constraint).tolist() == close(*signal, 0.0)
    shaped = penalise_row(constraint)
    assert shaped.term is None
    assert shaped.advantages.tolist() == close(1 - 0.4 * first, 1.0, -2 - 0.4 * last, 0.0)
    metrics = reduce(shaped.metrics, lambda tensor, _operation: tensor)
    assert metrics["constraint/penalty/mean"] == pytest.approx(0.4 * sum(signal) / 3, rel=1e-6)
    share = metrics["constraint/penalty_share/mean"]
    assert share == pytest.approx(0.4 * sum(signal) / 4, rel=1e-6)
    assert metrics[UNIT_SHARE] == pytest.approx(sum(signal) / 4, rel=1e-6)
    # Counted from 0.1, and beyond 0.1 with at most 0.15.
    advantages = penalise_row(constraint, baseline=0.1).advantages[:3].tolist()
    assert advantages == close(1 - 0.4 * (first - 0.1), 1.04, -2 - 0.4 * (last - 0.1))
    token = ConstraintConfig(measure=measure, gate="token", max_discrepancy=0.15)
    part = min(last, 0.15) - 0.1
    assert penalise_row(token).advantages.tolist() == close(1 - 0.02, 1.0, -2 - 0.4 * part, 0.0)


@pytest.mark.parametrize(
    ("penalty", "terms", "slopes"),
    [
        ("differentiable", (0.25, 0.125), (0.5, -0.5)),
        ("squared_difference", (0.0625, 0.015625), (0.25, -0.125)),
        ("squared_ratio", (1.0, 0.04), (4.0, -0.32)),
        ("squared_log_ratio", (LOG2**2, LOG125**2), (2 * LOG2, -2 * LOG125)),
    ],
)
@pytest.mark.parametrize("measure", get_args(Measure))
def test_every_form_of_the_loss_is_of_the_policy_whatever_drives_lambda(
    penalty, terms, slopes, measure
):
    constraint = ConstraintConfig(penalty=penalty, measure=measure)
    policy = TRAIN.clone().requires_grad_()
    found = penalise_row(constraint, policy)
    found.term.sum().backward()
    assert found.advantages.tolist() == [1.0, 1.0, -2.0, 0.0]
    assert found.term.tolist() == close(0.4 * terms[0], 0.0, 0.4 * terms[1], 0.0)
    assert policy.grad.tolist() == close(0.4 * slopes[0], 0.0, 0.4 * slopes[1], 0.0)
    metrics = reduce(found.metrics, lambda tensor, _operation: tensor)
    assert metrics["constraint/penalty/mean"] == pytest.approx(0.4 * sum(terms) / 3, rel=1e-5)


@pytest.mark.parametrize("penalty", get_args(Penalty))
@pytest.mark.parametrize("measure", get_args(Measure))
def test_a_row_without_a_token_has_a_gradient_of_0_and_the_same_metrics(penalty, measure):
    constraint = ConstraintConfig(penalty=penalty, measure=measure)
    policy = TRAIN.clone().requires_grad_()
    full, empty = (penalise_row(constraint, policy, mask) for mask in (MASK, NOTHING))
    assert empty.metrics.keys() == full.metrics.keys()
    assert reduce(empty.metrics, lambda tensor, _operation: tensor) == {}
    if penalty != "shaping":
        empty.term.sum().backward()
        assert empty.term.tolist() == policy.grad.tolist() == [0.0] * 4
    gap = gap_sum(0.0, 0)
    total, of_empty = constrained_sum(row_of(NOTHING), constraint, gap)
    assert (float(total.total), float(total.num_tokens)) == (0.0, 0.0)
    assert of_empty.keys() == constrained_sum(row_of(), constraint, gap_sum(0.375, 3))[1].keys()


def gap_sum(total: float, num_tokens: int) -> DiscrepancySum:
    """Sums of |p_train - p_inf|."""
    numbers = torch.tensor([total, num_tokens], dtype=torch.float64)
    return DiscrepancySum(total=numbers[0], num_tokens=numbers[1])


def test_the_sum_for_the_dual_step():
    gap = gap_sum(0.375, 3)
    assert constrained_sum(row_of(), ConstraintConfig(), gap) == (gap, {})
    for measure, total in (("ratio", 1.2), ("log_ratio", LOG2 + LOG125)):
        found, metrics = constrained_sum(row_of(), ConstraintConfig(measure=measure), gap)
        assert float(found.total) == pytest.approx(total, rel=1e-6)
        assert found.num_tokens is gap.num_tokens
        [(key, mean)] = reduce(metrics, lambda tensor, _operation: tensor).items()
        assert key == "constraint/signal/mean" and mean == found.mean


def test_without_the_constraint_there_is_no_metric_of_a_penalty():
    assert penalise_row(ConstraintConfig(enabled=False)).metrics == {}
