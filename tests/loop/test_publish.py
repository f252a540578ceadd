"""A publication without engines: who sends, who gives, what the probe sees, what is logged."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import Config, SyncConfig
from megatron_rl.engine.pool import engine_of
from megatron_rl.errors import EngineError, SyncError
from megatron_rl.loop.link import EngineLink, cut_sync_log, log_update
from megatron_rl.loop.publish import PROBE_PROMPTS, PROBE_SAMPLES, publish_weights
from megatron_rl.loop.state import LoopState
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.records import Prompt, Rollout
from megatron_rl.rollout.environment import EpisodeRequest
from megatron_rl.sync.publish import PublishReport
from megatron_rl.sync.source import WeightStream
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import make_prompt, make_rollout
from tests.fakes.learner import FakeLearner, FakeParallel

CONFIG = Config()
URLS = ("http://one", "http://two")


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


class ProbedEnvironment:
    """Every engine gives each token the log-prob that `logprobs` has for its url."""

    def __init__(self, urls: tuple[str, ...], logprobs: dict[str, float]) -> None:
        self.asked: list[EpisodeRequest] = []
        self._urls, self._logprobs = urls, logprobs

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Any
    ) -> tuple[Rollout, ...]:
        self.asked.append(request)
        url = engine_of(self._urls, prompt.index)
        rollout = make_rollout(request.sampling.max_tokens, logprob=self._logprobs[url])
        return tuple(replace(rollout, engine=url) for _ in range(request.num_samples))


def make_link(
    folder: Path,
    *,
    logprobs: dict[str, float] | None = None,
    error: SyncError | None = None,
    is_dead: bool = False,
) -> EngineLink:
    logprobs = logprobs or dict.fromkeys(URLS, -0.5)
    urls = tuple(logprobs)

    def check_after_failure() -> None:
        if is_dead:
            raise EngineError("engine 0 died")

    return EngineLink(
        publisher=FakePublisher(error),
        pool=FakePool(urls=urls),
        environment=ProbedEnvironment(urls, logprobs),
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


def test_rank_0_sends_and_probes_every_engine(tmp_path: Path) -> None:
    learner, link, state, phases = FakeLearner(), make_link(tmp_path), make_state(), Phases()
    figures = publish_weights(learner, link, URLS, state, CONFIG, phases)
    assert link.publisher.sent == [(5, ["model.norm.weight"])]
    assert state.published_version == 5
    assert phases.names == ["sync"]
    asked = link.environment.asked
    assert len(asked) == PROBE_PROMPTS * 2
    assert {request.num_samples for request in asked} == {PROBE_SAMPLES}
    # 48 tokens over 8 samples of an engine.
    assert {request.sampling.max_tokens for request in asked} == {6}
    assert figures == {
        "sync/probe_gap/mean": 0.0,
        "sync/probe_gap/max": 0.0,
        "sync/probe_relative_logprob_gap/max": 0.0,
    }
    [line] = [json.loads(each) for each in link.log.read_text().splitlines()]
    assert (line["version"], line["published"]) == (5, "9c")


def test_the_probe_samples_the_whole_distribution(tmp_path: Path) -> None:
    sampling = replace(CONFIG.rollout.sampling, top_p=0.9, top_k=20, min_p=0.1)
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, sampling=sampling))
    link = make_link(tmp_path)
    publish_weights(FakeLearner(), link, URLS, make_state(), config, Phases())
    for request in link.environment.asked:
        found = request.sampling
        assert (found.top_k, found.top_p, found.min_p) == (0, 1.0, 0.0)


def test_the_engine_that_serves_other_weights_is_named(tmp_path: Path) -> None:
    link = make_link(tmp_path, logprobs={"http://one": -0.5, "http://two": -1.0})
    with pytest.raises(SyncError, match="http://two"):
        publish_weights(FakeLearner(), link, URLS, make_state(), CONFIG, Phases())


def test_other_ranks_give_their_shards_and_wait() -> None:
    parallel = FakeParallel(rank=1, is_last_stage=False)
    learner, state = FakeLearner(parallel=parallel), make_state()
    publish_weights(learner, None, URLS, state, CONFIG, Phases())
    assert learner.log == ["give_tensors", "score_samples 0"]
    assert parallel.log == ["barrier", "from_last_stage"]
    assert state.published_version == 5


def test_without_a_probe_nothing_is_sampled(tmp_path: Path) -> None:
    config = replace(CONFIG, sync=SyncConfig(probe_num_tokens=0))
    link = make_link(tmp_path)
    assert publish_weights(FakeLearner(), link, URLS, make_state(), config, Phases()) == {}
    assert link.environment.asked == []


def test_a_replay_publishes_nothing() -> None:
    learner, phases, state = FakeLearner(), Phases(), make_state()
    config = replace(CONFIG, replay="runs/a/rollouts")
    assert publish_weights(learner, None, URLS, state, config, phases) == {}
    assert (learner.log, phases.names, state.published_version) == ([], [], 4)


def test_a_failed_update_is_told_by_the_death_of_its_engine(tmp_path: Path) -> None:
    error = SyncError("engine http://one, send: no answer")
    dead = make_link(tmp_path, error=error, is_dead=True)
    with pytest.raises(EngineError, match="engine 0 died"):
        publish_weights(FakeLearner(), dead, URLS, make_state(), CONFIG, Phases())
    alive, state = make_link(tmp_path, error=error), make_state()
    with pytest.raises(SyncError, match="no answer"):
        publish_weights(FakeLearner(), alive, URLS, state, CONFIG, Phases())
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
