"""When engines sleep, and who tells them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config import Config
from megatron_rl.errors import EngineError, SyncError
from megatron_rl.loop.link import EngineLink
from megatron_rl.loop.rest import engines_asleep
from tests.fakes.learner import FakeParallel


@dataclass(kw_only=True)
class RestingParallel(FakeParallel):
    device: Any = field(default_factory=lambda: SimpleNamespace(type="cuda"))


def rest(config: Config, parallel: RestingParallel, *, is_first: bool = True) -> list[str]:
    """What is done in order, with "learner" for the work in between."""
    note = parallel.log.append
    link = link_with(sleep=lambda: note("sleep"), wake=lambda: note("wake")) if is_first else None
    with engines_asleep(link, parallel, config):
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


def test_colocated_engines_sleep_when_every_replica_has_its_samples() -> None:
    config = config_of("colocated")
    assert rest(config, RestingParallel()) == ["barrier", "sleep", "learner", "wake", "barrier"]
    other = rest(config, RestingParallel(rank=1), is_first=False)
    assert other == ["barrier", "learner", "barrier"]


@pytest.mark.parametrize("placement", ["auto", "share", "nodes"])
def test_others_stay_awake(placement: str) -> None:
    assert rest(config_of(placement), RestingParallel()) == ["learner"]


def test_on_a_cpu_and_in_a_replay_nobody_sleeps() -> None:
    on_cpu = RestingParallel(device=SimpleNamespace(type="cpu"))
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
            link_with(is_dead=is_dead, **calls), RestingParallel(), config_of("colocated")
        ),
    ):
        pass
