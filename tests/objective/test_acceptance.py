"""The estimate of J by which an update stays or is taken back, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.objective.acceptance import weighted_objective

# Of four tokens: rho = 2, 1/2, 4 and 1.
ROLLOUT = torch.tensor([0.25, 0.5, 0.125, 0.5]).log()
NEW = torch.tensor([0.5, 0.25, 0.5, 0.5]).log()
ADVANTAGES = torch.tensor([1.0, -2.0, 1.0, 0.5])


def test_worked_by_hand() -> None:
    # Weights 2, 1/2, 2 (bounded) and 1: (2 - 1 + 2 + 0.5) / 4.
    found = weighted_objective(NEW, ROLLOUT, ADVANTAGES, cap=2.0)
    assert found == pytest.approx(3.5 / 4, rel=1e-6)
    # Bounded at 8: (2 - 1 + 4 + 0.5) / 4; at 1: (1 - 1 + 1 + 0.5) / 4.
    assert weighted_objective(NEW, ROLLOUT, ADVANTAGES, cap=8.0) == pytest.approx(5.5 / 4)
    assert weighted_objective(NEW, ROLLOUT, ADVANTAGES, cap=1.0) == pytest.approx(1.5 / 4)


def test_equal_policies_give_the_mean_advantage_exactly() -> None:
    assert weighted_objective(ROLLOUT, ROLLOUT, ADVANTAGES, cap=2.0) == 0.5 / 4


def test_a_huge_ratio_is_finite() -> None:
    found = weighted_objective(torch.zeros(1), torch.tensor([-900.0]), torch.ones(1), cap=math.inf)
    assert found == pytest.approx(math.exp(20))


def test_refuses_nothing_and_unequal_shapes() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        weighted_objective(torch.zeros(0), torch.zeros(0), torch.zeros(0), cap=2.0)
    with pytest.raises(ValueError, match="one shape"):
        weighted_objective(torch.zeros(2), torch.zeros(2), torch.zeros(3), cap=2.0)
