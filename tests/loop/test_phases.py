"""The phases of a replay, with stand-ins for the learner and the source: each has its parts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_rl.config import CheckpointConfig, Config, ConstraintConfig
from megatron_rl.loop.parts import Run
from megatron_rl.loop.phases import phases_of
from megatron_rl.loop.state import initial_state
from tests.fakes.learner import FakeLearner
from tests.loop.test_broken import SOUND


def replayed_run(folder: Path) -> Run:
    config = Config(run_dir=str(folder), replay="runs/a/rollouts")
    nothing: Any = None
    stopwatch: Any = SimpleNamespace(time=lambda name: nullcontext())
    recorder: Any = SimpleNamespace(say=print)
    meter: Any = SimpleNamespace(measure=nothing)
    checkpoints: Any = SimpleNamespace(advance=lambda: None)
    learner: Any = FakeLearner()
    return Run(
        config=replace(config, checkpoint=CheckpointConfig(every=2)),
        learner=learner,
        state=initial_state(ConstraintConfig()),
        recorder=recorder,
        writer=nothing,
        stopwatch=stopwatch,
        verifiers={},
        crew=None,
        inputs=nothing,
        was_resumed=False,
        source=None,
        evaluator=None,
        link=None,
        contributor=None,
        meter=meter,
        scorer=None,
        checkpoints=checkpoints,
    )


def test_a_replay_publishes_accepts_and_records_nothing(tmp_path: Path) -> None:
    run = replayed_run(tmp_path)
    phases = phases_of(run)
    sampled: Any = None
    run.state.step = 1
    assert phases.publish() == {}
    assert phases.acceptance.decide(sampled) == {}
    phases.record(1, sampled, [])
    with phases.asleep():
        pass
    assert not phases.end(SOUND)  # no checkpoint is due after step 1
    assert run.learner.log == []
