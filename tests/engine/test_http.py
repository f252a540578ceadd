"""The blocking calls against a server that answers as it is told to; on a real one:
tests/sync/test_publish.py and test_server.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from megatron_rl.engine.http import EngineControl, ReadinessProbe
from megatron_rl.errors import SyncError
from tests.fakes.http_server import Answer, FakeServer

# Each method, what it is called in errors, and its route.
CALLS: dict[str, tuple[Callable[[EngineControl], object], str, str]] = {
    "world_size": (EngineControl.world_size, "connect", "/get_world_size"),
    "initialize": (
        lambda control: control.initialize({"a": 1}),
        "connect",
        "/init_weight_transfer_engine",
    ),
    "is_paused": (EngineControl.is_paused, "pause", "/is_paused"),
    "pause": (EngineControl.pause, "pause", "/pause?mode=wait&clear_cache=true"),
    "freeze": (
        lambda control: control.pause(mode="keep"),
        "pause",
        "/pause?mode=keep&clear_cache=false",
    ),
    "start": (EngineControl.start, "start", "/start_weight_update"),
    "update": (lambda control: control.update("bucket 3", {"b": 2}), "bucket 3", "/update_weights"),
    "finish": (lambda control: control.finish(7), "finish", "/finish_weight_update"),
    "reset": (EngineControl.reset_prefix_cache, "reset prefix cache", "/reset_prefix_cache"),
    "reset all": (
        lambda control: control.reset_prefix_cache(with_running=True),
        "reset prefix cache",
        "/reset_prefix_cache?reset_running_requests=true",
    ),
    "resume": (EngineControl.resume, "resume", "/resume"),
}
BODIES = {
    "initialize": {"init_info": {"a": 1}},
    "update": {"update_info": {"b": 2}},
    "finish": {"weight_version": "7"},
}


@contextmanager
def control_of(
    *answers: Answer, seconds: float = 5.0
) -> Iterator[tuple[EngineControl, FakeServer]]:
    server = FakeServer(*answers)
    control = EngineControl(server.address, seconds)
    try:
        yield control, server
    finally:
        control.close()
        server.close()


@pytest.mark.parametrize("name", list(CALLS))
def test_each_call_has_its_route_its_body_and_the_token(name: str) -> None:
    call, _, path = CALLS[name]
    with control_of((200, {"world_size": 4, "is_paused": True, "success": True})) as (
        control,
        server,
    ):
        assert call(control) == {"world_size": 4, "is_paused": True}.get(name)
    assert (server.paths, server.tokens) == ([path], ["Bearer t"])
    assert server.requests == [BODIES.get(name, {})]


@pytest.mark.parametrize("name", list(CALLS))
def test_a_refusal_names_engine_phase_and_answer(name: str) -> None:
    call, phase, _ = CALLS[name]
    with control_of((500, {"error": "x" * 1000})) as (control, server):
        with pytest.raises(SyncError) as failure:
            call(control)
        expected = f"engine {server.address.url}, {phase}: expected status 200, got 500: "
    message = str(failure.value)
    assert message.startswith(expected + '{"error": "xxx')
    assert len(message) == len(expected) + 600  # a long answer is cut


def test_no_answer_names_the_setting() -> None:
    with (
        control_of("hang", seconds=0.3) as (control, _),
        pytest.raises(SyncError, match=r"start: expected an answer within 0\.3 s.*sync\.timeout_s"),
    ):
        control.start()


def test_a_broken_connection_is_an_error() -> None:
    with (
        control_of("reset") as (control, _),
        pytest.raises(SyncError, match="finish: expected an answer, got RemoteProtocolError"),
    ):
        control.finish(3)


def test_a_prefix_cache_that_stays_is_an_error() -> None:
    with (
        control_of((200, {"success": False})) as (control, _),
        pytest.raises(SyncError, match=r"expected success, got .*blocks computed with the old"),
    ):
        control.reset_prefix_cache()


@pytest.mark.parametrize("answer", [(400, {}), "reset", "hang"])
def test_abandoning_never_raises(answer: Answer) -> None:
    with control_of(answer, seconds=0.3) as (control, server):
        began = time.monotonic()
        control.abandon("the learner died")
        assert time.monotonic() - began < 2.0
    assert server.paths == ["/update_weights"]
    assert server.requests == [{"update_info": {"abandon": "the learner died"}}]


def test_the_probe_sends_the_token_only_when_it_should() -> None:
    server = FakeServer((200, {}), (401, {}), (200, {}), "reset")
    with ReadinessProbe(server.address, 5.0) as probe:
        assert probe.is_up()
        assert not probe.answers_anybody()
        assert probe.accepts_token()
        assert not probe.accepts_token()  # broken connections are no answer
    server.close()
    assert server.paths == ["/health", "/version", "/version", "/version"]
    assert server.tokens == [None, None, "Bearer t", "Bearer t"]
    with ReadinessProbe(server.address, 5.0) as probe:
        assert not probe.is_up()


def test_a_pause_may_take_the_time_of_the_requests_in_flight() -> None:
    with control_of("hang", seconds=0.2) as (control, _):
        begin = time.monotonic()
        with pytest.raises(SyncError, match=r"within 0\.7 s"):
            control.pause(drain_seconds=0.5)
        assert 0.6 < time.monotonic() - begin < 2
