"""A call that waits for an engine ends when the engine answers no health checks, and only then."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from megatron_rl.config import SyncConfig
from megatron_rl.engine.http import EngineControl
from megatron_rl.errors import SilentEngineError, SyncError
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.source import WeightStream
from tests.fakes.http_server import FakeServer

SILENCE_SECONDS = 0.5


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with closing(FakeServer((200, {}))) as served:
        yield served


@pytest.fixture
def control(server: FakeServer) -> Iterator[EngineControl]:
    with closing(EngineControl(server.address, 20.0)) as engine:
        yield engine


def test_a_pause_may_take_longer_than_a_check(server: FakeServer, control: EngineControl) -> None:
    server.delay_seconds = 3 * SILENCE_SECONDS
    control.pause(silence_seconds=SILENCE_SECONDS)
    assert server.num_checks >= 3


def test_an_engine_that_freezes_in_a_pause_is_found(
    server: FakeServer, control: EngineControl
) -> None:
    server.delay_seconds = 20.0
    threading.Timer(SILENCE_SECONDS, setattr, (server, "is_frozen", True)).start()
    begin = time.monotonic()
    with pytest.raises(SilentEngineError, match=r"within 0\.5 s .*it is frozen"):
        control.pause(drain_seconds=600.0, silence_seconds=SILENCE_SECONDS)
    assert SILENCE_SECONDS < time.monotonic() - begin < 6 * SILENCE_SECONDS


def test_an_answer_and_an_error_arrive_as_without_checks(
    server: FakeServer, control: EngineControl
) -> None:
    control.pause(silence_seconds=SILENCE_SECONDS)
    server.is_frozen = True  # answers a pause that ends before the first check
    control.pause(silence_seconds=SILENCE_SECONDS)
    server.delay_seconds = 2.0
    server.is_frozen = False
    late = EngineControl(server.address, 0.3)
    with pytest.raises(SyncError, match=r"pause: expected an answer within 0\.3 s") as failure:
        late.pause(silence_seconds=SILENCE_SECONDS)
    assert not isinstance(failure.value, SilentEngineError)
    late.close()


def test_an_update_does_not_begin_with_a_frozen_engine(server: FakeServer) -> None:
    """It is told to the roster, and nothing that may last was asked of it."""
    server.is_frozen = True
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
