"""The pool with engines that die, freeze, or answer garbage, NaN, old weights or nothing: the
requests go out again, with the same seeds, to an engine that is well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest

from megatron_rl.config import RolloutConfig, SamplingConfig
from megatron_rl.engine import pool as pool_module
from megatron_rl.engine.health import FIRST_FACTOR
from megatron_rl.engine.pool import HttpEnginePool
from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.engine.roster import Roster
from megatron_rl.errors import EngineError, EnginesLostError
from tests.fakes.http_server import Answer, FakeServer

HEALTH_SECONDS = 1.0  # of the tests that wait for it


def choice(
    logprob: float | None = -0.5, version: str = "3", finish: str = "stop"
) -> dict[str, Any]:
    return {
        "index": 0,
        "token_ids": [7],
        "finish_reason": finish,
        "logprobs": {"content": [{"token_id": 7, "logprob": logprob}]},
        "weight_versions": [{"version": version, "start": 0, "end": 1}],
    }


GOOD = (200, {"choices": [choice()]})
NAN = (200, {"choices": [choice(logprob=-9999.0)]})  # as the engine writes it
OLD = (200, {"choices": [choice(version="default")]})
EMPTY = (200, {"choices": []})
GARBAGE = (200, {"detail": "not an answer of vLLM"})
POISONED = (503, {"error": {"type": "weights_poisoned", "message": "an update was left"}})
BROKEN = (500, {"error": {"message": "engine hiccup"}})


@pytest.fixture
def started() -> Iterator[Callable[..., FakeServer]]:
    servers: list[FakeServer] = []

    def start(*answers: Answer) -> FakeServer:
        servers.append(FakeServer(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def pool_of(
    *servers: FakeServer,
    ended: Mapping[str, str] | None = None,
    is_warm: bool = True,
    **config: Any,
) -> HttpEnginePool:
    settings = {"health_timeout_seconds": 10.0, "max_retries": 0} | config
    roster = Roster([server.address.url for server in servers], settings.get("min_engines", 1))
    for url in roster.urls if is_warm else ():
        roster.note_answer(url, "an earlier prompt")
    return HttpEnginePool(
        [server.address for server in servers],
        RolloutConfig(num_engines=len(servers), **settings),
        check=lambda: None,
        find_ended=lambda: ended or {},
        roster=roster,
        version=lambda: 3,
    )


def ask(pool: HttpEnginePool, *keys: int) -> list[Completion]:
    async def generate(key: int, sampler: Sampler) -> Completion:
        sampling = SamplingConfig(max_tokens=4)
        request = GenerateRequest(
            token_ids=(1, key), num_samples=1, seed=100 + key, sampling=sampling, key=key
        )
        [completion] = await sampler.generate(request)
        return completion

    return pool.run([partial(generate, key) for key in keys])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (NAN, "expected a log-prob above"),
        (OLD, "expected samples of weight version 3 or later, got 0"),
        (EMPTY, "expected 1 samples for prompt"),
        (GARBAGE, "expected an answer of vLLM, got KeyError"),
        (POISONED, "weights_poisoned"),
        (BROKEN, r"failed 1 times .*engine hiccup"),
        ("reset", r"failed 1 times"),
        ("hang", r"expected an answer within rollout\.request_timeout_seconds=0\.4"),
    ],
    ids=["NaN", "old weights", "too few", "garbage", "poisoned", "broken", "reset", "nothing"],
)
def test_an_engine_that_answers_badly_is_left_out(
    answer: Answer, told: str, started: Callable[..., FakeServer]
) -> None:
    sick, well = started(answer), started(GOOD)
    pool = pool_of(sick, well, request_timeout_seconds=0.4)
    completions = ask(pool, *range(4))
    assert {each.engine for each in completions} == {well.address.url}
    assert pool.urls == (well.address.url,)
    asked = {each["token_ids"][1]: each for each in well.requests}
    assert sorted(asked) == [0, 1, 2, 3]
    for request in sick.requests:  # the same seed, and all else
        assert request == asked[request["token_ids"][1]]
    assert sick.requests and pool.shortage() == ""
    [completion] = ask(pool, 9)  # and the engine is not asked again
    assert completion.engine == well.address.url
    # Without another engine it is the end, with the cause.
    alone = pool_of(started(answer), request_timeout_seconds=0.4)
    with pytest.raises(EnginesLostError, match=told):
        ask(alone, 1)


def test_two_engines_that_fail_at_a_request_end_the_run(started: Callable[..., FakeServer]) -> None:
    """The weights or the request are at fault, and starting engines again would not help."""
    one, two, three = started(NAN), started(NAN), started(GOOD)
    with pytest.raises(EngineError, match="before that: engine") as error:
        ask(pool_of(one, two, three), 5)
    assert not isinstance(error.value, EnginesLostError)
    assert three.requests == []


def test_a_frozen_engine_is_found_by_its_health(started: Callable[..., FakeServer]) -> None:
    frozen, well = started("hang"), started(GOOD)
    frozen.is_frozen = True
    begin = time.monotonic()
    pool = pool_of(frozen, well, health_timeout_seconds=HEALTH_SECONDS)
    completions = ask(pool, 0, 1, 2)
    assert time.monotonic() - begin < HEALTH_SECONDS + 1.5
    assert {each.engine for each in completions} == {well.address.url}
    assert pool.urls == (well.address.url,)


def test_the_first_request_of_an_engine_may_take_longer(started: Callable[..., FakeServer]) -> None:
    """It may compile kernels."""
    cold, well = started("hang"), started(GOOD)
    cold.is_frozen = True
    pool = pool_of(cold, well, is_warm=False, health_timeout_seconds=0.3)
    begin = time.monotonic()
    ask(pool, 0, 1)
    assert time.monotonic() - begin > 0.3 * FIRST_FACTOR


def test_a_long_response_is_no_freeze(started: Callable[..., FakeServer]) -> None:
    """Its engine answers health checks meanwhile."""
    slow = started("hang")
    pool = pool_of(slow, request_timeout_seconds=2.5, health_timeout_seconds=HEALTH_SECONDS)
    begin = time.monotonic()
    with pytest.raises(EnginesLostError, match=r"request_timeout_seconds=2\.5"):
        ask(pool, 0)
    assert time.monotonic() - begin > 2 * HEALTH_SECONDS


def test_an_engine_that_cannot_be_reached_is_left_out(started: Callable[..., FakeServer]) -> None:
    well, gone = started(GOOD), started(GOOD)
    gone.close()
    pool = pool_of(
        gone, well, max_retries=50, health_timeout_seconds=HEALTH_SECONDS
    )  # retries alone would take minutes
    begin = time.monotonic()
    assert {each.engine for each in ask(pool, 0, 1)} == {well.address.url}
    assert time.monotonic() - begin < HEALTH_SECONDS + 2.0


def test_a_dead_engine_is_told_by_its_log(started: Callable[..., FakeServer]) -> None:
    dead, well = started("hang"), started(GOOD)
    reason = "engine 0: ended by SIGKILL while serving"
    pool = pool_of(dead, well, ended={dead.address.url: reason})
    begin = time.monotonic()
    assert {each.engine for each in ask(pool, 0, 1)} == {well.address.url}
    assert time.monotonic() - begin < 2.0
    alone = pool_of(dead, ended={dead.address.url: reason})
    with pytest.raises(EnginesLostError, match=f"^{reason}$"):
        ask(alone, 0)


def test_fewer_engines_than_the_bound_end_the_round(started: Callable[..., FakeServer]) -> None:
    sick, well = started(NAN), started(GOOD)
    with pytest.raises(EnginesLostError, match=r"min_engines=2 that serve, got 1 of 2"):
        ask(pool_of(sick, well, min_engines=2), 0, 1)


def test_scores_come_from_an_engine_that_is_well(started: Callable[..., FakeServer]) -> None:
    scores = (200, {"choices": [choice()], "prompt_logprobs": [None, {"9": {"logprob": -1.5}}]})
    pool = pool_of(started(GARBAGE), started(scores))
    assert pool.score([(1, 9), (1, 9)]) == [(0.0, -1.5)] * 2


def test_what_is_waited_for_is_told(
    started: Callable[..., FakeServer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pool_module, "TELL_SECONDS", 0.4)
    server = started(GOOD, "hang")
    pool = pool_of(server, request_timeout_seconds=1.5)
    with caplog.at_level(logging.WARNING), pytest.raises(EnginesLostError):
        ask(pool, 12, 13)
    [first, *_] = [record.message for record in caplog.records]
    assert first.startswith("waited ") and "s for prompt 1" in first
    assert f"{server.address.url} answered prompt 1" in first or "an earlier prompt" in first


def test_a_session_goes_on_when_an_engine_is_taken_in_again(
    started: Callable[..., FakeServer],
) -> None:
    """As sampling ahead does: its session stays open."""
    server = started(NAN, GOOD)
    pool = pool_of(server)

    async def twice() -> Completion:
        async with pool.session() as sampler:
            request = GenerateRequest(
                token_ids=(1, 2), num_samples=1, seed=0, sampling=SamplingConfig(), key=0
            )
            with pytest.raises(EnginesLostError):
                await sampler.generate(request)
            pool._roster.take_in(server.address.url)
            [completion] = await sampler.generate(request)
            return completion

    assert asyncio.run(twice()).token_ids == (7,)
