"""A call that waits for an engine ends when the engine answers no health checks, and only then."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_rl.config import SyncConfig
from megatron_rl.engine.address import ALIVE_ROUTE, EngineAddress
from megatron_rl.engine.http import EngineControl
from megatron_rl.errors import SilentEngineError, SyncError
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.source import WeightStream

TOKEN = "a-token"
SILENCE_SECONDS = 0.5


class Server(ThreadingHTTPServer):
    """An engine that answers a pause after `pause_seconds`, and checks until it is frozen."""

    pause_seconds = 0.0
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.is_frozen, self.is_closed = threading.Event(), threading.Event()
        self.num_checks = 0

    @property
    def address(self) -> EngineAddress:
        return EngineAddress(url=f"http://127.0.0.1:{self.server_port}", token=TOKEN)


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path == ALIVE_ROUTE:
            self.server.num_checks += 1
            if self.server.is_frozen.is_set():
                self.server.is_closed.wait(30.0)
        self.answer(200 if self.headers["Authorization"] == f"Bearer {TOKEN}" else 401)

    def do_POST(self) -> None:
        self.server.is_closed.wait(self.server.pause_seconds)
        self.answer(200)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_arguments: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.is_closed.set()
        served.shutdown()


@pytest.fixture
def control(server: Server) -> Iterator[EngineControl]:
    engine = EngineControl(server.address, 20.0)
    yield engine
    engine.close()


def test_a_pause_may_take_longer_than_a_check(server: Server, control: EngineControl) -> None:
    server.pause_seconds = 3 * SILENCE_SECONDS
    control.pause(silence_seconds=SILENCE_SECONDS)
    assert server.num_checks >= 3


def test_an_engine_that_freezes_in_a_pause_is_found(server: Server, control: EngineControl) -> None:
    server.pause_seconds = 20.0
    threading.Timer(SILENCE_SECONDS, server.is_frozen.set).start()
    begin = time.monotonic()
    with pytest.raises(SilentEngineError, match=r"within 0\.5 s .*it is frozen"):
        control.pause(drain_seconds=600.0, silence_seconds=SILENCE_SECONDS)
    assert SILENCE_SECONDS < time.monotonic() - begin < 6 * SILENCE_SECONDS


def test_an_answer_and_an_error_arrive_as_without_checks(
    server: Server, control: EngineControl
) -> None:
    control.pause(silence_seconds=SILENCE_SECONDS)
    server.is_frozen.set()  # answers a pause that ends before the first check
    control.pause(silence_seconds=SILENCE_SECONDS)
    server.pause_seconds = 2.0
    server.is_frozen.clear()
    late = EngineControl(server.address, 0.3)
    with pytest.raises(SyncError, match=r"pause: expected an answer within 0\.3 s") as failure:
        late.pause(silence_seconds=SILENCE_SECONDS)
    assert not isinstance(failure.value, SilentEngineError)
    late.close()


def test_an_update_does_not_begin_with_a_frozen_engine(server: Server) -> None:
    """It is told to the roster, and nothing that may last was asked of it."""
    server.is_frozen.set()
    lost: dict[str, str] = {}
    publisher = Publisher(
        [server.address],
        SyncConfig(),
        wire_dtype=None,
        silence_seconds=lambda _: SILENCE_SECONDS,
        leave_out=lost.__setitem__,
    )
    begin = time.monotonic()
    with publisher, pytest.raises(SilentEngineError):
        publisher.publish(WeightStream(specs=(), tensors=()), version=1)
    assert time.monotonic() - begin < 4 * SILENCE_SECONDS
    assert list(lost) == [server.address.url] and "frozen" in lost[server.address.url]
