"""The gap of fresh weights, and a tolerance that counts from it."""

from __future__ import annotations

import json
import math

import pytest

from megatron_rl.errors import DivergenceError
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.objective.fresh_gap import WINDOW, FreshGap


def test_the_mean_of_the_last_measurements() -> None:
    fresh = FreshGap()
    with pytest.raises(ValueError, match="expected a measurement before the first step"):
        _ = fresh.value
    fresh.add(0.5, version=0)
    assert fresh.value == 0.5
    for version in range(1, WINDOW + 1):
        fresh.add(0.25, version)
    assert fresh.value == 0.25  # the first one is forgotten
    with pytest.raises(DivergenceError, match="expected a finite mean for version 99, got nan"):
        fresh.add(math.nan, version=99)


def test_weights_that_are_published_again_do_not_count() -> None:
    fresh = FreshGap()
    fresh.add(0.25, version=3)
    fresh.add(9.0, version=3)
    resumed = FreshGap()
    resumed.load_state_dict(json.loads(json.dumps(fresh.state_dict())))
    resumed.add(9.0, version=3)
    assert (fresh.value, resumed.value) == (0.25, 0.25)
    resumed.add(0.75, version=4)
    assert resumed.value == 0.5
    resumed.load_state_dict(None)  # of a run without measurements
    resumed.add(0.125, version=0)
    assert resumed.value == 0.125


def make_dual() -> DualVariable:
    return DualVariable(0.0, learning_rate=2.0, tolerance=0.125, fresh_gap=FreshGap())


def test_lambda_follows_the_gap_above_that_of_fresh_weights() -> None:
    dual = make_dual()
    dual.fresh_gap.add(0.5, version=0)
    assert dual.tolerance == 0.625
    assert dual.update(0.625) == 0.0
    assert dual.update(0.75) == 0.25
    dual.fresh_gap.add(0.75, version=1)  # rounding grows, and the tolerance with it
    assert dual.update(0.75) == 0.25
    resumed = make_dual()
    resumed.load_state_dict(json.loads(json.dumps(dual.state_dict())))
    assert (resumed.tolerance, resumed.update(1.0)) == (dual.tolerance, dual.update(1.0))
