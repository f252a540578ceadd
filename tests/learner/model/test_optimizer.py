"""The learning rate of every step of a run, worked by hand, and what weight decay takes hold of."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.learner.support.single_rank import LEARNING_RATE, NUM_UPDATES

# Steps count from 1. A warm-up's first step has a rate; a decay reaches 0 one past the last step.
FACTORS = {
    "constant_0": [1.0] * 8,
    "constant_3": [1 / 3, 2 / 3, *[1.0] * 6],
    "linear_0": [1 - step / 9 for step in range(1, 9)],
    "linear_3": [1 / 3, 2 / 3, 1.0, *[1 - step / 6 for step in range(1, 6)]],
    "cosine_0": [(1 + math.cos(math.pi * step / 9)) / 2 for step in range(1, 9)],
    "cosine_3": [1 / 3, 2 / 3, *[(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]],
}


@pytest.mark.parametrize("name", list(FACTORS))
def test_learning_rate_of_every_step(name: str, single_rank: dict[str, Any]) -> None:
    rates = single_rank["schedules"][name]["rates"]
    assert len(rates) == NUM_UPDATES
    for of_groups, factor in zip(rates, FACTORS[name], strict=True):
        assert of_groups == pytest.approx([LEARNING_RATE * factor] * len(of_groups))
        assert of_groups[0] > 0


def test_matrices_decay_and_norms_do_not(single_rank: dict[str, Any]) -> None:
    assert sorted(single_rank["schedules"]["constant_0"]["decays"]) == [(0.0, [1]), (0.1, [2])]
