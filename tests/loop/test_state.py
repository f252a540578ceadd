"""The record of what changes from step to step: counted, saved and loaded."""

from __future__ import annotations

import json

import pytest

from megatron_rl.config import ConstraintConfig
from megatron_rl.errors import DataError
from megatron_rl.loop.state import initial_state
from megatron_rl.rollout.ledger import Ledger


def test_it_starts_with_the_settings_of_the_constraint() -> None:
    state = initial_state(ConstraintConfig(initial=0.3, learning_rate=0.5, tolerance=0.01))
    assert (state.step, state.next_prompt, state.published_version) == (0, 0, 0)
    assert (state.dual.value, state.dual.tolerance) == (0.3, 0.01)
    assert state.dual.update(0.03) == pytest.approx(0.3 + 0.5 * 0.02)


def test_a_tolerance_is_calibrated_over_the_first_steps() -> None:
    state = initial_state(
        ConstraintConfig(initial=0.3, tolerance="auto", tolerance_steps=2, tolerance_slack=0.0)
    )
    assert state.dual.is_at_rest
    state.dual.update(0.01)
    state.dual.update(0.03)
    assert not state.dual.is_at_rest
    assert state.dual.tolerance == pytest.approx(0.02)
    assert state.dual.value == 0.3


def test_the_settings_of_a_calibrated_tolerance_and_of_the_warning_are_used() -> None:
    settings = {"tolerance": "auto", "tolerance_steps": 2, "tolerance_slack": 0.0}
    settings |= {"tolerance_factor": 0.5, "reference_tolerance": 0.01, "warn_after_steps": 5}
    dual = initial_state(ConstraintConfig(initial=0.3, learning_rate=2.0, **settings)).dual
    for gap in (0.01, 0.03):
        dual.update(gap)
    # The measured gap of 0.02 is twice the reference.
    assert (dual.tolerance, dual.value, dual.learning_rate) == pytest.approx((0.01, 0.15, 0.5))
    assert dual.maximum == pytest.approx(5.0)
    lines = [(dual.update(0.02), dual.warning())[1] for _ in range(5)]
    assert lines[:4] == [None] * 4 and "each of the last 5 steps" in lines[4]


def test_the_gap_of_fresh_weights_belongs_to_an_enabled_constraint() -> None:
    settings = {"tolerance_above": "fresh_gap", "tolerance": 0.25}
    assert initial_state(ConstraintConfig(enabled=False, **settings)).dual.fresh_gap is None
    for constraint in (
        ConstraintConfig(**settings),
        ConstraintConfig(fixed_lambda=1.0, **settings),
    ):
        dual = initial_state(constraint).dual
        dual.fresh_gap.add(0.5, version=0)
        assert dual.tolerance == 0.75


def test_a_fixed_lambda_stays() -> None:
    settings = {"tolerance": "auto", "tolerance_steps": 2, "reference_tolerance": 0.01}
    dual = initial_state(ConstraintConfig(fixed_lambda=12.0, initial=0.3, **settings)).dual
    for gap in (0.5, 0.5, 0.9, 0.0):
        assert dual.update(gap) == 12.0
    assert dual.watch is None and dual.tolerance == 0.5


@pytest.mark.parametrize(
    "settings", [{"warn_after_steps": 0}, {"learning_rate": 0.0}, {"minimum": 0.1, "maximum": 0.1}]
)
def test_a_lambda_that_stays_by_the_settings_is_not_warned_of(settings) -> None:
    assert initial_state(ConstraintConfig(**settings)).dual.watch is None


def test_steps_are_counted_once() -> None:
    state = initial_state(ConstraintConfig())
    assert [state.step for _ in state.steps(3)] == [1, 2, 3]
    assert list(state.steps(3)) == []
    assert list(state.steps(5)) == [4, 5]


def test_it_comes_back_from_a_checkpoint() -> None:
    state = initial_state(ConstraintConfig())
    next(state.steps(9))
    state.next_prompt = 64
    state.ledger = Ledger(first=64, ahead=(66, 70))
    state.dual.update(0.5)
    saved = json.loads(json.dumps(state.state_dict()))
    assert saved.keys() == {"step", "next_prompt", "used_ahead", "num_broken", "dual"}
    found = initial_state(ConstraintConfig())
    found.load_state_dict(saved)
    assert (found.step, found.next_prompt, found.dual.value) == (1, 64, state.dual.value)
    assert found.ledger == state.ledger
    assert list(found.steps(2)) == [2]


def test_a_checkpoint_without_lambda_is_refused() -> None:
    state = initial_state(ConstraintConfig())
    with pytest.raises(DataError, match="expected a checkpoint with a finite 'value'"):
        state.load_state_dict({"step": 1, "next_prompt": 1, "dual": {}})
