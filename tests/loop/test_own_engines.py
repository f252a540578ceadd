"""The engines that a rank starts: which have ended, and how they are started again."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest

from megatron_rl.config import Config
from megatron_rl.engine.address import EngineAddress
from megatron_rl.errors import EngineError
from megatron_rl.loop.engines import RunEngines
from megatron_rl.process.node import Node

NODE = Node(index=0, count=1, num_ranks=1)


class OwnEngine:
    """An engine that is ready at once, unless it `is_broken`."""

    def __init__(self, url: str) -> None:
        self.address = EngineAddress(url=url, token="t")
        self.reason, self.num_checks, self.num_starts, self.is_broken = "", 0, 0, False
        self.num_stops = 0

    def check(self) -> None:
        self.num_checks += 1
        if self.reason:
            raise EngineError(self.reason)

    def restart(self) -> None:
        self.num_starts += 1
        self.reason = ""

    def stop(self) -> None:
        self.num_stops += 1

    def is_ready(self) -> bool:
        if self.is_broken:
            raise EngineError("engine 1: exited with code 3 before it was ready")
        return True


@pytest.fixture
def engines() -> list[OwnEngine]:
    return [OwnEngine("http://a"), OwnEngine("http://b")]


def own(engines: list[OwnEngine], said: list[str]) -> RunEngines:
    config = Config()
    config = replace(config, rollout=replace(config.rollout, max_restarts=2))
    found = RunEngines(config, NODE, ExitStack(), said.append)
    found._started = engines  # type: ignore[assignment]
    return found


def test_an_engine_that_ended_is_told_once_and_started_again(engines: list[OwnEngine]) -> None:
    run = own(engines, [])
    assert run.ended() == {} and run.own == run.restartable == {"http://a", "http://b"}
    engines[1].reason = "engine 1: ended by SIGKILL"
    num_checks = engines[1].num_checks
    for _ in range(3):
        assert run.ended() == {"http://b": "engine 1: ended by SIGKILL"}
    assert engines[1].num_checks == num_checks + 1  # its log is read once
    run.restart("http://b")
    assert run.ended() == {} and run.restarting == {"http://b"}
    assert run.restarted() == {"http://b"}
    assert (run.restarting, run.restarted()) == (set(), set())


def test_one_that_does_not_start_is_started_as_often_as_is_allowed(
    engines: list[OwnEngine],
) -> None:
    said: list[str] = []
    run = own(engines, said)
    engines[1].is_broken = True
    run.restart("http://b")
    for _ in range(4):
        assert run.restarted() == set()
    assert engines[1].num_starts == 2
    assert said == ["engine 1: exited with code 3 before it was ready"] * 2
    assert (run.restarting, run.restartable) == (set(), {"http://a"})


def test_one_that_is_ended_is_not_waited_for(engines: list[OwnEngine]) -> None:
    run = own(engines, [])
    run.restart("http://b")
    run.halt("http://b")
    assert (engines[1].num_stops, run.restarting, run.restarted()) == (1, set(), set())
    assert (engines[0].num_stops, run.restartable) == (0, {"http://a", "http://b"})
