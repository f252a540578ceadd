"""The ratio of sums over sequences and its standard error, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.sync.ratios import ratio


def test_worked_by_hand() -> None:
    """R = 6 / 8; residuals 1 - 1.5, 2 - 1.5, 3 - 3: squares 0.5; se^2 = 3/2 * 0.5 / 64."""
    value, standard_error = ratio(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 4.0]))
    assert value == 0.75
    assert standard_error == pytest.approx(math.sqrt(0.75 / 64), rel=1e-12)


def test_of_equal_denominators_it_is_the_error_of_a_mean() -> None:
    values = torch.tensor([1.0, 4.0, 4.0, 7.0])
    value, standard_error = ratio(values, torch.ones(4))
    assert value == 4.0
    assert standard_error == pytest.approx(float(values.std()) / 2, rel=1e-6)


@pytest.mark.parametrize("lists", [([], []), ([1.0], [2.0]), ([1.0, 2.0], [0.0, 0.0])])
def test_nothing_is_known_of_too_little(lists: tuple[list[float], list[float]]) -> None:
    numerators, denominators = map(torch.tensor, lists)
    assert ratio(numerators, denominators)[1] == math.inf
