"""Steps without an update are counted, told, and end the run when there are too many in a row."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config import CheckpointConfig, Config, ConstraintConfig
from megatron_rl.errors import DivergenceError
from megatron_rl.loop.broken import count_broken
from megatron_rl.loop.record import StepEnd
from megatron_rl.loop.state import initial_state
from megatron_rl.records import StepReport
from tests.fakes.learner import FakeLearner

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


@pytest.mark.parametrize(("every", "hf_every"), [(2, 0), (0, 2), (0, 0)])
def test_weights_that_are_not_finite_are_not_saved(
    every: int, hf_every: int, tmp_path: Path
) -> None:
    """Neither to resume from nor for others; without a checkpoint nobody looks at them here."""
    settings = CheckpointConfig(every=every, hf_every=hf_every)
    config = replace(Config(), run_dir=str(tmp_path), checkpoint=settings)
    state, saved = initial_state(ConstraintConfig()), []
    state.step = 2
    learner: Any = FakeLearner(problem="rank 0: expected finite weights, got nan in decoder.bias")
    checkpoints: Any = SimpleNamespace(advance=lambda: None, save=saved.append)
    nothing: Any = None
    told = pytest.raises(DivergenceError, match=r"decoder\.bias, after step 2.*resume=never")
    with told if every or hf_every else contextlib.nullcontext():
        StepEnd(
            learner,
            state,
            config,
            nothing,
            nothing,
            nothing,
            checkpoints,
            print,
            lambda name: contextlib.nullcontext(),
            contextlib.nullcontext,
        ).finish(SOUND)
    assert saved == []
