"""Steps without an update are counted, told, and end the run when there are too many in a row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rl.config import Config, ConstraintConfig
from megatron_rl.errors import DivergenceError
from megatron_rl.loop.broken import count_broken
from megatron_rl.loop.state import initial_state
from megatron_rl.records import StepReport

SOUND = StepReport(step=1, dual_value=0.1, metrics={}, problem="")


def test_so_many_in_a_row_and_no_more() -> None:
    config = Config()
    config = replace(config, learner=replace(config.learner, max_broken_steps=2))
    state, said = initial_state(ConstraintConfig()), []
    for step, is_broken in enumerate((True, True, False, True, True), start=1):
        problem = "rank 1: expected a finite gradient, got nan" if is_broken else ""
        count_broken(state, replace(SOUND, step=step, problem=problem), config, said.append)
    assert state.num_broken == 2
    assert len(said) == 4
    assert said[0].startswith("step 1: no update (1 in a row, learner.max_broken_steps=2)")
    with pytest.raises(DivergenceError, match=r"step 6 is the 3\. in a row.*those of step 3") as e:
        count_broken(state, replace(SOUND, step=6, problem="NaN"), config, said.append)
    assert "\n" not in str(e.value)


def test_it_is_kept_by_a_checkpoint() -> None:
    state, loaded = initial_state(ConstraintConfig()), initial_state(ConstraintConfig())
    state.num_broken = 2
    loaded.load_state_dict(state.state_dict())
    assert loaded.num_broken == 2
    old = state.state_dict()
    del old["num_broken"]
    loaded.load_state_dict(old)
    assert loaded.num_broken == 0


def test_none_is_allowed_with_a_limit_of_none() -> None:
    config = Config()
    config = replace(config, learner=replace(config.learner, max_broken_steps=0))
    state = initial_state(ConstraintConfig())
    count_broken(state, SOUND, config, print)
    with pytest.raises(DivergenceError, match=r"step 1 is the 1\. in a row"):
        count_broken(state, replace(SOUND, problem="NaN"), config, print)
