"""When engines sleep, who tells them, and where the learner's state is meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config import Config
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


class Crew:
    """Notes what it is asked for, where the collectives are noted."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def fall_asleep(self, sleep: Callable[[Sequence[str]], Any] | None) -> None:
        self._log.append(f"sleep {sleep and sleep(())}")

    def wake_up(self, wake: Callable[[Sequence[str]], Any] | None) -> None:
        self._log.append(f"wake {wake and wake(())}")


def rest(config: Config, parallel: RestingParallel, *, is_first: bool = True) -> list[str]:
    """What is done in order, with "learner" for the work in between."""
    publisher = SimpleNamespace(sleep=lambda urls: "all", wake=lambda urls: "all")
    link = SimpleNamespace(publisher=publisher) if is_first else None
    crew: Any = Crew(parallel.log)
    with engines_asleep(crew, link, learner_of(parallel), config, phase):
        parallel.log.append("learner")
    return parallel.log


def config_of(placement: str) -> Config:
    config = Config()
    return replace(config, rollout=replace(config.rollout, placement=placement))


def test_the_learner_has_its_state_while_colocated_engines_sleep() -> None:
    """It comes when all engines have freed their memory, and has left every rank when they wake."""
    config = config_of("colocated")
    first = rest(config, RestingParallel())
    other = rest(config, RestingParallel(rank=1), is_first=False)
    for log, asked in ((first, "all"), (other, "None")):
        before = ["barrier", f"sleep {asked}", "barrier", "onload"]
        assert log == [*before, "learner", "offload", "barrier", f"wake {asked}", "barrier"]


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
