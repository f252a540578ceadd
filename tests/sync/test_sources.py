"""Several sources of one update, each a thread with gloo groups of its own: whatever goes wrong in
it, all of them give it up, and the next one reaches the engines that are left.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rl.config import SyncConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.errors import SourceLostError, SyncError
from megatron_rl.sync.contribute import Contributor
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.source import WeightStream
from megatron_rl.sync.sources import Sources
from megatron_rl.sync.wire import TensorSpec
from tests.sync.fake_engine import FakeEngine

SECONDS = 1.0  # sync.timeout_seconds
CONFIG = SyncConfig(transport="collective", bucket_mib=128 / 2**20, timeout_seconds=SECONDS)
NUM_SOURCES, NUM_TENSORS = 3, 9
SPECS = tuple(
    TensorSpec(name=f"layers.{index}", dtype=torch.float32, shape=(24,))  # 96 of 128 bytes
    for index in range(NUM_TENSORS)
)
OWNERS = tuple(index * NUM_SOURCES // NUM_TENSORS for index in range(NUM_TENSORS))
LOST = ("world_size", "initialize", "pause", "start", "manifest", "bucket 2", "bucket 5", "finish")


class LosableEngine(FakeEngine):
    """Ends before the call that `lost_at` names."""

    def __init__(self, url: str) -> None:
        super().__init__(url, {spec.name: spec for spec in SPECS})
        self.lost_at = ""

    def __getattribute__(self, name: str) -> Any:
        call = super().__getattribute__(name)
        if name not in ("world_size", "initialize", "pause", "start", "update", "finish"):
            return call

        def called(*arguments: Any, **named: Any) -> Any:
            what = " ".join([name, *map(str, arguments[:1])]) if name == "update" else name
            if self.lost_at and self.lost_at in what:
                for worker in self.workers:
                    worker.close()
                raise SyncError(f"engine {self.url}, {what}: no answer")
            return call(*arguments, **named)

        return called


def tensors_of(source: int, version: int) -> Iterator[tuple[str, torch.Tensor]]:
    for index, (spec, owner) in enumerate(zip(SPECS, OWNERS, strict=True)):
        if owner == source:
            yield spec.name, torch.full((24,), float(100 * version + index))


def stream_of(source: int, version: int) -> WeightStream:
    return WeightStream(specs=SPECS, tensors=tensors_of(source, version), sources=OWNERS)


class Run:
    """The sources of a run, and two engines."""

    def __init__(self, stack: ExitStack) -> None:
        self.engines = {
            url: LosableEngine(url) for url in ("http://127.0.0.1:1", "http://127.0.0.1:2")
        }
        self._pool = stack.enter_context(ThreadPoolExecutor(NUM_SOURCES))
        store, timeout = dist.HashStore(), datetime.timedelta(seconds=20)
        groups = self.on_all(lambda rank: dist.ProcessGroupGloo(store, rank, NUM_SOURCES, timeout))
        addresses = [EngineAddress(url=url, token="secret") for url in self.engines]
        self.publisher = stack.enter_context(
            Publisher(
                addresses,
                CONFIG,
                wire_dtype=None,
                sources=Sources(groups[0]),
                control=lambda address, _: self.engines[address.url],
            )
        )
        self.contributors = [
            stack.enter_context(Contributor(CONFIG, sources=Sources(group), wire_dtype=None))
            for group in groups[1:]
        ]

    def on_all(self, call: Callable[[int], Any]) -> list[Any]:
        return list(self._pool.map(call, range(NUM_SOURCES)))

    def publish(self, version: int) -> list[str]:
        """The error of each source, "" if it had none."""
        return self.on_all(lambda source: self._publish(source, version))

    def _publish(self, source: int, version: int) -> str:
        stream = stream_of(source, version)
        try:
            if source:
                self.contributors[source - 1].contribute(stream)
            else:
                self.publisher.publish(stream, version=version)
        except SyncError as error:
            assert not isinstance(error, SourceLostError)
            return str(error)
        return ""

    def check(self, url: str, version: int) -> None:
        """The engine serves this version in full."""
        engine = self.engines[url]
        assert engine.version == version
        [model] = engine.models
        assert [float(model[spec.name][0]) for spec in SPECS] == [
            100.0 * version + index for index in range(NUM_TENSORS)
        ]


@pytest.fixture
def run() -> Iterator[Run]:
    with ExitStack() as stack:
        yield Run(stack)


@pytest.mark.parametrize("lost_at", LOST)
def test_an_engine_is_lost_and_the_others_are_published_to(run: Run, lost_at: str) -> None:
    assert run.publish(1) == [""] * NUM_SOURCES
    run.check("http://127.0.0.1:1", 1)
    run.check("http://127.0.0.1:2", 1)
    run.engines["http://127.0.0.1:2"].lost_at = lost_at
    errors = run.publish(2)
    assert "engine http://127.0.0.1:2" in errors[0] and "no answer" in errors[0]
    run.publisher.choose(["http://127.0.0.1:1"])
    assert run.publish(2) == [""] * NUM_SOURCES
    run.check("http://127.0.0.1:1", 2)
    # It was started again, without its old connections, and is taken in.
    run.engines["http://127.0.0.1:2"] = LosableEngine("http://127.0.0.1:2")
    run.publisher._all[1] = run.engines["http://127.0.0.1:2"]
    run.publisher._host_of[run.engines["http://127.0.0.1:2"]] = "127.0.0.1"
    run.publisher.choose(["http://127.0.0.1:1", "http://127.0.0.1:2"])
    assert run.publish(3) == [""] * NUM_SOURCES
    assert run.publish(4) == [""] * NUM_SOURCES
    run.check("http://127.0.0.1:1", 4)
    run.check("http://127.0.0.1:2", 4)


@pytest.mark.parametrize("phase", ["connect", "send", "fill"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_source_gives_up_and_all_begin_again(
    run: Run, phase: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines wait for its broadcast until their timeout, and answer with an error."""
    contributor = run.contributors[number - 1]

    def fail(*_: Any) -> None:
        raise SyncError(f"no {phase}")

    of_sender = "buffer" if phase == "fill" else phase
    with monkeypatch.context() as patched:
        patched.setattr(contributor._sender, of_sender, fail)
        errors = run.publish(1)
    assert errors[0] and f"no {phase}" in errors[number]
    assert run.publish(2) == [""] * NUM_SOURCES
    run.check("http://127.0.0.1:1", 2)
    run.check("http://127.0.0.1:2", 2)


def test_a_source_that_is_gone_ends_it() -> None:
    store, timeout = dist.HashStore(), datetime.timedelta(seconds=0.5)
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, timeout), (0, 1)))
    first, second = map(Sources, groups)
    first.open()
    told = "source 0 .*: expected to send the offers of an update to source 1 within parallel"
    with pytest.raises(SourceLostError, match=told):
        first.offer([{}])
    with pytest.raises(SourceLostError, match=r"source 1 .*: expected to recv the offers"):
        second.offers()
