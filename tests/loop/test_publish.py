"""A publication without engines: who sends, who gives, who probes, what is logged."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import Config, SyncConfig
from megatron_rl.errors import EngineError, SyncError
from megatron_rl.loop.link import EngineLink, cut_sync_log, log_update
from megatron_rl.loop.publish import publish_weights
from megatron_rl.loop.state import LoopState
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.sync.publish import PublishReport
from megatron_rl.sync.source import WeightStream
from tests.fakes.engine_pool import FakePool
from tests.fakes.environment import TwoTurns
from tests.fakes.groups import make_prompt
from tests.fakes.learner import FakeLearner, FakeParallel

CONFIG = Config()


def report_of(version: int) -> PublishReport:
    return PublishReport(
        version=version,
        num_bytes=16,
        num_buckets=1,
        checksum="9c",
        received={"http://one": ("9c",)},
        checksums={"model.norm.weight": "4e"},
        seconds={"total": 0.1},
    )


class FakePublisher:
    def __init__(self, error: SyncError | None = None) -> None:
        self.sent: list[tuple[int, list[str]]] = []
        self._error = error

    def publish(self, stream: WeightStream, *, version: int) -> PublishReport:
        if self._error is not None:
            raise self._error
        self.sent.append((version, [name for name, _ in stream.tensors]))
        return report_of(version)


class FakeProbe:
    """Notes the versions and checksums that it is asked to check."""

    def __init__(self) -> None:
        self.checked: list[tuple[int, str]] = []

    def __call__(self, version: int, checksum: str) -> dict[str, float]:
        self.checked.append((version, checksum))
        return {"sync/probe_gap/mean": 0.25}


def make_link(folder: Path, *, error: SyncError | None = None, is_dead: bool = False) -> EngineLink:
    def check_after_failure() -> None:
        if is_dead:
            raise EngineError("engine 0 died")

    return EngineLink(
        publisher=FakePublisher(error),
        pool=FakePool(),
        environment=TwoTurns(),
        prompts=lambda start, count: [make_prompt(index) for index in range(start, start + count)],
        log=folder / "sync.jsonl",
        check_after_failure=check_after_failure,
    )


def make_state() -> LoopState:
    return LoopState(dual=DualVariable(0.1), step=5, published_version=4)


class Phases:
    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        self.names.append(name)
        return contextlib.nullcontext()


def test_rank_0_sends_and_probes(tmp_path: Path) -> None:
    learner, link, state, phases = FakeLearner(), make_link(tmp_path), make_state(), Phases()
    probe = FakeProbe()
    figures = publish_weights(learner, link, probe, state, CONFIG, phases)
    assert link.publisher.sent == [(5, ["model.norm.weight"])]
    assert state.published_version == 5
    assert phases.names == ["sync"]
    assert probe.checked == [(5, "9c")]
    assert figures == {"sync/probe_gap/mean": 0.25}
    [line] = [json.loads(each) for each in link.log.read_text().splitlines()]
    assert (line["version"], line["published"]) == (5, "9c")


def test_other_ranks_give_their_shards_wait_and_probe() -> None:
    parallel, probe = FakeParallel(rank=1, is_last_stage=False), FakeProbe()
    learner, state = FakeLearner(parallel=parallel), make_state()
    publish_weights(learner, None, probe, state, CONFIG, Phases())
    assert learner.log == ["give_tensors"]
    assert parallel.log == ["barrier"]
    assert probe.checked == [(5, "")]
    assert state.published_version == 5


def test_without_a_probe_nothing_is_sampled(tmp_path: Path) -> None:
    config = replace(CONFIG, sync=SyncConfig(probe_num_tokens=0))
    link, probe = make_link(tmp_path), FakeProbe()
    assert publish_weights(FakeLearner(), link, probe, make_state(), config, Phases()) == {}
    assert probe.checked == []


def test_a_replay_publishes_nothing() -> None:
    learner, phases, state = FakeLearner(), Phases(), make_state()
    config = replace(CONFIG, replay="runs/a/rollouts")
    assert publish_weights(learner, None, FakeProbe(), state, config, phases) == {}
    assert (learner.log, phases.names, state.published_version) == ([], [], 4)


def test_a_failed_update_is_told_by_the_death_of_its_engine(tmp_path: Path) -> None:
    error = SyncError("engine http://one, send: no answer")
    dead = make_link(tmp_path, error=error, is_dead=True)
    with pytest.raises(EngineError, match="engine 0 died"):
        publish_weights(FakeLearner(), dead, FakeProbe(), make_state(), CONFIG, Phases())
    alive, state = make_link(tmp_path, error=error), make_state()
    with pytest.raises(SyncError, match="no answer"):
        publish_weights(FakeLearner(), alive, FakeProbe(), state, CONFIG, Phases())
    assert state.published_version == 4


def test_the_log_forgets_updates_that_are_published_again(tmp_path: Path) -> None:
    path = tmp_path / "sync.jsonl"
    for version in range(4):
        log_update(path, report_of(version))
    with path.open("a") as file:
        file.write('{"version": 4, "byt')  # a killed process
    cut_sync_log(path, 2)
    assert [json.loads(line)["version"] for line in path.read_text().splitlines()] == [0, 1]
    cut_sync_log(tmp_path / "absent.jsonl", 2)
