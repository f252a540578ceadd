"""When engines sleep, who tells them, and where the learner's state is meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config import Config
from megatron_rl.errors import EngineError, SyncError
from megatron_rl.loop.link import EngineLink
from megatron_rl.loop.rest import engines_asleep, make_room
from tests.fakes.learner import FakeLearner, FakeParallel


@dataclass(kw_only=True)
class RestingParallel(FakeParallel):
    device: Any = field(default_factory=lambda: SimpleNamespace(type="cuda"))


def learner_of(parallel: RestingParallel) -> FakeLearner:
    """It notes what it does where the collectives are noted."""
    return FakeLearner(parallel=parallel, log=parallel.log)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    assert name == "turns"
    yield


def rest(config: Config, parallel: RestingParallel, *, is_first: bool = True) -> list[str]:
    """What is done in order, with "learner" for the work in between."""
    note = parallel.log.append
    link = link_with(sleep=lambda: note("sleep"), wake=lambda: note("wake")) if is_first else None
    with engines_asleep(link, learner_of(parallel), config, phase):
        note("learner")
    return parallel.log


def link_with(*, is_dead: bool = False, **calls: Callable[[], None]) -> EngineLink:
    def check_after_failure() -> None:
        if is_dead:
            raise EngineError("engine 0 died")

    return EngineLink(
        publisher=SimpleNamespace(**calls),
        pool=None,
        environment=None,
        prompts=lambda first, count: [],
        log=Path("sync.jsonl"),
        check_after_failure=check_after_failure,
    )


def config_of(placement: str) -> Config:
    config = Config()
    return replace(config, rollout=replace(config.rollout, placement=placement))


def test_the_learner_has_its_state_while_colocated_engines_sleep() -> None:
    """It comes when all engines have freed their memory, and has left every rank when they wake."""
    config = config_of("colocated")
    before, after = ["barrier", "sleep", "barrier", "onload"], ["offload", "barrier", "wake"]
    assert rest(config, RestingParallel()) == [*before, "learner", *after, "barrier"]
    other = rest(config, RestingParallel(rank=1), is_first=False)
    alone = ["barrier", "barrier", "onload", "learner", "offload", "barrier", "barrier"]
    assert other == alone


def test_colocated_engines_have_the_memory_first() -> None:
    parallel = RestingParallel()
    make_room(learner_of(parallel), config_of("colocated"))
    assert parallel.log == ["offload"]


@pytest.mark.parametrize("placement", ["auto", "share", "nodes"])
def test_with_others_all_stays_where_it_is(placement: str) -> None:
    parallel = RestingParallel()
    make_room(learner_of(parallel), config_of(placement))
    assert rest(config_of(placement), parallel) == ["learner"]


def test_so_it_does_on_a_cpu_and_in_a_replay() -> None:
    on_cpu = RestingParallel(device=SimpleNamespace(type="cpu"))
    make_room(learner_of(on_cpu), config_of("colocated"))
    assert rest(config_of("colocated"), on_cpu) == ["learner"]
    replayed = replace(config_of("colocated"), replay="runs/a/rollouts")
    assert rest(replayed, RestingParallel()) == ["learner"]


@pytest.mark.parametrize("call", ["sleep", "wake"])
@pytest.mark.parametrize("is_dead", [True, False])
def test_a_call_that_fails_is_told_by_the_death_of_its_engine(call: str, is_dead: bool) -> None:
    def fail() -> None:
        raise SyncError("engine http://one: no answer")

    calls = {"sleep": lambda: None, "wake": lambda: None} | {call: fail}
    expected = (EngineError, "engine 0 died") if is_dead else (SyncError, "no answer")
    with (
        pytest.raises(expected[0], match=expected[1]),
        engines_asleep(
            link_with(is_dead=is_dead, **calls),
            learner_of(RestingParallel()),
            config_of("colocated"),
            phase,
        ),
    ):
        pass
