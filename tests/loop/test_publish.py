"""A publication without engines: who sends, who gives, who probes, what is logged."""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import Config, SyncConfig
from megatron_rl.errors import DivergenceError, EngineError, SourceLostError, SyncError
from megatron_rl.loop.folder import cut_sync_log
from megatron_rl.loop.link import EngineLink, log_update
from megatron_rl.loop.publish import Publication
from megatron_rl.loop.state import LoopState
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.objective.fresh_gap import FreshGap
from megatron_rl.sync.contribute import Contributor
from megatron_rl.sync.publish import PublishReport
from megatron_rl.sync.source import WeightStream
from tests.fakes.crew import FakeCrew
from tests.fakes.engine_pool import FakePool
from tests.fakes.environment import TwoTurns
from tests.fakes.groups import make_prompt
from tests.fakes.learner import FakeLearner, FakeParallel

CONFIG = Config()
FIGURES = {"sync/probe_gap/mean": 0.25, "sync/fresh_gap/mean": 0.125}


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
    """Raises each of `errors` once, after it took `num_taken` tensors."""

    def __init__(self, *errors: SyncError, num_taken: int = 0) -> None:
        self.sent: list[tuple[int, list[str]]] = []
        self.chosen: list[tuple[str, ...]] = []
        self._errors, self._num_taken = list(errors), num_taken

    def choose(self, urls: tuple[str, ...]) -> None:
        self.chosen.append(urls)

    def publish(self, stream: WeightStream, *, version: int) -> PublishReport:
        if self._errors:
            list(itertools.islice(stream.tensors, self._num_taken))
            raise self._errors.pop(0)
        self.sent.append((version, [name for name, _ in stream.tensors]))
        return report_of(version)


class FakeProbe:
    """Notes the versions and checksums that it is asked to check."""

    def __init__(self) -> None:
        self.checked: list[tuple[int, str]] = []

    def __call__(self, version: int, checksum: str) -> dict[str, float]:
        self.checked.append((version, checksum))
        return dict(FIGURES)


def make_link(folder: Path, *errors: SyncError, num_taken: int = 0) -> EngineLink:
    return EngineLink(
        publisher=FakePublisher(*errors, num_taken=num_taken),
        pool=FakePool(),
        environment=TwoTurns(),
        prompts=lambda start, count: [make_prompt(index) for index in range(start, start + count)],
        log=folder / "sync.jsonl",
    )


def make_state() -> LoopState:
    return LoopState(dual=DualVariable(0.1), step=5, published_version=4)


def make_measured_state() -> LoopState:
    """Whose tolerance of 0.5 counts from the gap of fresh weights."""
    dual = DualVariable(0.1, tolerance=0.5, fresh_gap=FreshGap())
    return LoopState(dual=dual, step=5, published_version=4)


class Phases:
    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        self.names.append(name)
        return contextlib.nullcontext()


def test_rank_0_sends_and_probes(tmp_path: Path) -> None:
    learner, link, state, phases = FakeLearner(), make_link(tmp_path), make_state(), Phases()
    probe = FakeProbe()
    figures = Publication(learner, link, probe, FakeCrew(), state, CONFIG, phases).publish()
    assert link.publisher.sent == [(5, ["model.norm.weight"])]
    assert state.published_version == 5
    assert phases.names == ["sync"]
    assert probe.checked == [(5, "9c")]
    assert figures == FIGURES
    [line] = [json.loads(each) for each in link.log.read_text().splitlines()]
    assert (line["version"], line["published"]) == (5, "9c")


def test_the_tolerance_counts_from_the_gap_of_the_published_weights(tmp_path: Path) -> None:
    learner, link, state = FakeLearner(), make_link(tmp_path), make_measured_state()
    publication = Publication(learner, link, FakeProbe(), FakeCrew(), state, CONFIG, Phases())
    publication.publish()
    assert state.dual.tolerance == 0.625
    assert state.dual.fresh_gap.state_dict() == {"gaps": [0.125], "version": 5}


def test_other_ranks_give_their_shards_wait_and_probe() -> None:
    parallel, probe = FakeParallel(rank=1, is_last_stage=False), FakeProbe()
    learner, state = FakeLearner(parallel=parallel), make_state()
    Publication(learner, None, probe, FakeCrew(), state, CONFIG, Phases()).publish()
    assert learner.log == ["give_tensors"]
    assert parallel.log == ["first_problem"]
    assert probe.checked == [(5, "")]
    assert state.published_version == 5


@pytest.mark.parametrize("step", [0, 5])
def test_weights_that_are_not_finite_are_not_published(tmp_path: Path, step: int) -> None:
    """No engine is told anything, and the line says with what to go on."""
    run_dir = tmp_path / "run"
    for saved in (2, 4, 5):  # the last one was being replaced, of the steps that are repeated
        (run_dir / f"checkpoints/step_{saved:06d}").mkdir(parents=True)
    config = replace(CONFIG, run_dir=str(run_dir))
    link, crew, state = make_link(tmp_path), FakeCrew(), make_state()
    state.step = step
    learner = FakeLearner(problem="rank 1: expected finite weights, got nan in decoder.bias")
    told = rf"got nan in decoder\.bias, before the first step; look at {config.model.path}"
    if step:
        told = r"decoder\.bias, after step 5; .* keep those of version 4; .* resume=.*/step_000004$"
    with pytest.raises(DivergenceError, match=told) as caught:
        Publication(learner, link, FakeProbe(), crew, state, config, Phases()).publish()
    assert "\n" not in str(caught.value)
    assert (crew.log, link.publisher.sent, learner.log) == ([], [], [])


def test_without_a_probe_nothing_is_sampled(tmp_path: Path) -> None:
    config = replace(CONFIG, sync=SyncConfig(probe_num_tokens=0))
    link, probe = make_link(tmp_path), FakeProbe()
    crew, state = FakeCrew(), make_state()
    assert Publication(FakeLearner(), link, probe, crew, state, config, Phases()).publish() == {}
    assert probe.checked == []


def test_a_replay_publishes_nothing() -> None:
    learner, phases, state = FakeLearner(), Phases(), make_state()
    config = replace(CONFIG, replay="runs/a/rollouts")
    assert Publication(learner, None, FakeProbe(), None, state, config, phases).publish() == {}
    assert (learner.log, phases.names, state.published_version) == ([], [], 4)


@pytest.mark.parametrize("num_taken", [0, 1])
def test_a_lost_engine_is_left_out_and_the_update_is_sent_again(
    tmp_path: Path, num_taken: int
) -> None:
    """After the shards of the failed update were gathered, which the other ranks give."""
    error = SyncError("engine http://two, send: no answer")
    link, crew = make_link(tmp_path, error, num_taken=num_taken), FakeCrew("a", "b", lost=["b"])
    learner, probe, state = FakeLearner(), FakeProbe(), make_state()
    Publication(learner, link, probe, crew, state, CONFIG, Phases()).publish()
    assert crew.log == ["gather", "examine", "gather", "take in 1"]
    assert link.publisher.chosen == [("a",)]
    assert learner.log == ["full_tensors"] * 2
    assert link.publisher.sent == [(5, ["model.norm.weight"])]
    assert (state.published_version, probe.checked) == (5, [(5, "9c")])


class FakeContributor(Contributor):
    """Gives the first update up, after it took no tensor; sends the others."""

    def __init__(self, error: SyncError) -> None:
        self.errors, self.sent = [error], []

    def contribute(self, stream: WeightStream) -> None:
        if self.errors:
            raise self.errors.pop()
        self.sent += [name for name, _ in stream.tensors]


@pytest.mark.parametrize("is_first", [True, False])
def test_with_many_sources_it_is_left_out_too(tmp_path: Path, is_first: bool) -> None:
    """Every source has given the update up, and sends again."""
    config = replace(CONFIG, sync=SyncConfig(transport="collective"))
    link: Any = make_link(tmp_path, SyncError("engine http://two, send: no answer"))
    if not is_first:
        link = FakeContributor(SyncError("source 0 of the weights gave the update up"))
    learner = FakeLearner(parallel=FakeParallel(rank=0 if is_first else 1))
    crew, state = FakeCrew("a", "b", lost=["b"]), make_state()
    Publication(learner, link, FakeProbe(), crew, state, config, Phases()).publish()
    assert crew.log == ["gather", "examine", "gather", "take in 1"]
    assert learner.log == ["owned_tensors"] * 2
    sent = link.publisher.sent[0][1] if is_first else link.sent
    assert (sent, state.published_version) == (["model.norm.weight"], 5)


def test_a_source_that_is_gone_is_an_error(tmp_path: Path) -> None:
    """The other ranks wait in vain, and are not waited for."""
    config = replace(CONFIG, sync=SyncConfig(transport="collective"))
    link, crew, learner = make_link(tmp_path, SourceLostError("gone")), FakeCrew("a"), FakeLearner()
    with pytest.raises(SourceLostError, match="gone"):
        Publication(learner, link, FakeProbe(), crew, make_state(), config, Phases()).publish()
    assert (crew.log, learner.parallel.log) == (["gather"], [])


def test_an_update_that_fails_with_every_engine_alive_is_an_error(tmp_path: Path) -> None:
    crew, state = FakeCrew("a"), make_state()
    error = SyncError("engine a, worker 0: expected checksum 1, got 2")
    link = make_link(tmp_path, error, error)
    with pytest.raises(SyncError, match="expected checksum"):
        Publication(FakeLearner(), link, FakeProbe(), crew, state, CONFIG, Phases()).publish()
    assert state.published_version == 4
    # Once is no error: somebody else may have started an engine again meanwhile.
    link = make_link(tmp_path, error)
    Publication(FakeLearner(), link, FakeProbe(), FakeCrew("a"), state, CONFIG, Phases()).publish()
    assert (state.published_version, link.publisher.chosen) == (5, [("a",)])
    state.published_version = 4
    # Every rank ends with it.
    parallel = FakeParallel(rank=1, other_values=["engine a, finish: no answer"])
    with pytest.raises(SyncError, match="finish: no answer"):
        learner = FakeLearner(parallel=parallel)
        Publication(learner, None, FakeProbe(), FakeCrew("a"), state, CONFIG, Phases()).publish()


def test_an_engine_that_is_lost_in_the_probe_has_all_published_again(tmp_path: Path) -> None:
    link, crew, answers = make_link(tmp_path), FakeCrew("a", "b"), iter([None, FIGURES])
    state = make_measured_state()

    def probe(version: int, checksum: str) -> dict[str, float] | None:
        return next(answers)

    figures = Publication(FakeLearner(), link, probe, crew, state, CONFIG, Phases()).publish()
    assert figures == FIGURES
    assert state.dual.fresh_gap.state_dict() == {"gaps": [0.125], "version": 5}
    assert [version for version, _ in link.publisher.sent] == [5, 5]


def test_engines_are_brought_back_with_the_version_that_the_step_needs(tmp_path: Path) -> None:
    crew, state, link = FakeCrew(), make_measured_state(), make_link(tmp_path)
    parts = (FakeLearner(), link, FakeProbe(), crew, state, CONFIG, Phases())
    weights = Publication(*parts)
    assert not weights.restore("")
    assert link.publisher.sent == []
    assert weights.restore("none is left")
    crew.shortage = "another rank has none"
    assert weights.restore("")
    assert [version for version, _ in link.publisher.sent] == [4, 4]
    assert state.dual.fresh_gap.state_dict() == {"gaps": [0.125], "version": 4}
    state.published_version = 3  # sync.every=2
    with pytest.raises(EngineError, match=r"none is left; .* version 3 .*sync\.every=1"):
        weights.restore("none is left")
    replay = replace(weights, crew=None)
    with pytest.raises(EngineError, match="none is left"):
        replay.restore("none is left")
    assert not replay.restore("")


def test_the_log_forgets_updates_that_are_published_again(tmp_path: Path) -> None:
    path = tmp_path / "sync.jsonl"
    for version in range(4):
        log_update(path, report_of(version))
    with path.open("a") as file:
        file.write('{"version": 4, "byt')  # a killed process
    cut_sync_log(path, 2)
    assert [json.loads(line)["version"] for line in path.read_text().splitlines()] == [0, 1]
    cut_sync_log(tmp_path / "absent.jsonl", 2)
