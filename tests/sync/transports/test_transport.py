"""Whole updates between the publisher and engines in this process, through two transports: the
package's, and one that a single added file defines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.engine.address import EngineAddress
from megatron_rl.errors import SyncError
from megatron_rl.sync import transports
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.source import WeightStream
from megatron_rl.sync.transports.transport import (
    Bucket,
    Offer,
    Piece,
    Transfer,
    receiver_class,
    sender_class,
    transport_names,
)
from megatron_rl.sync.wire import TensorSpec
from tests.fakes.device_memory import use_fake_device
from tests.sync.fake_engine import FakeEngine

TRANSPORTS = ("shared_memory", "collective", "ipc", "files")
URLS = ("http://127.0.0.1:1", "http://127.0.0.1:2")
NUM_WORKERS = (1, 2)
SHAPES = {"a": (7, 5), "b": (300,), "c": ()}  # b is larger than a bucket
SPECS = tuple(TensorSpec(name=n, dtype=torch.float32, shape=s) for n, s in SHAPES.items())


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def stream(tensors: dict[str, torch.Tensor]) -> WeightStream:
    return WeightStream(specs=SPECS, tensors=tensors.items())


@pytest.fixture(autouse=True)
def added_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more file in the folder of the transports is all that a transport needs. CUDA IPC takes
    the CPU for a GPU.
    """
    added = str(Path(__file__).parent / "added")
    monkeypatch.setattr(transports, "__path__", [*transports.__path__, added])
    use_fake_device(monkeypatch)


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Publisher, list[FakeEngine]]]]:
    publishers = []

    def start_with(transport: str, timeout: float = 5.0) -> tuple[Publisher, list[FakeEngine]]:
        expected = {spec.name: spec for spec in SPECS}
        engines = [FakeEngine(url, expected, count) for url, count in zip(URLS, NUM_WORKERS)]
        by_url = {engine.url: engine for engine in engines}
        config = SimpleNamespace(
            transport=transport,
            bucket_mib=512 / 2**20,
            timeout_seconds=timeout,
            running_requests="wait",
        )
        publisher = Publisher(
            [EngineAddress(url=url, token="") for url in URLS],
            config,
            wire_dtype=None,
            control=lambda address, _: by_url[address.url],
        )
        publishers.append(publisher)
        return publisher, engines

    yield start_with
    for publisher in publishers:
        publisher.close()


def assert_all_serve(engines: list[FakeEngine], tensors: dict[str, torch.Tensor]) -> None:
    for engine in engines:
        for worker, model in zip(engine.workers, engine.models):
            assert not worker.is_incomplete
            assert model.keys() == tensors.keys()
            assert all(torch.equal(model[name], tensors[name]) for name in tensors)


def test_a_transport_is_found_by_the_name_of_its_file():
    assert transport_names() == ("collective", "files", "ipc", "shared_memory")
    assert sender_class("files").__module__ == "megatron_rl.sync.transports.files"


@pytest.mark.parametrize("name", ["nccl", "transport", "", "../files", "shared_memory.Sender"])
def test_nothing_else_is_imported(start, name):
    with pytest.raises(
        SyncError, match=r"sync\.transport: expected one of collective, files, ipc, shared_memory"
    ):
        start(name)
    with pytest.raises(
        SyncError, match=r"sync\.transport: expected one of collective, files, ipc, shared_memory"
    ):
        receiver_class(name)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_updates_reach_every_worker_of_every_engine(start, transport):
    publisher, engines = start(transport)
    for version in (1, 2, 3):
        tensors = weights(version)
        report = publisher.publish(stream(tensors), version=version)
        assert_all_serve(engines, tensors)
        assert [engine.version for engine in engines] == [version, version]
        assert report.received == {
            url: (report.checksum,) * count for url, count in zip(URLS, NUM_WORKERS)
        }
        assert report.num_buckets == 4 and report.num_bytes == 4 * (35 + 300 + 1)
    steps = ["initialize", "pause", "start", "manifest", *["bucket"] * 4, "finish", "reset"]
    assert engines[0].calls == [*steps, "resume"] * 3


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_broken_update_leaves_every_engine_incomplete_and_a_whole_one_mends_it(start, transport):
    publisher, engines = start(transport)
    publisher.publish(stream(weights(1)), version=1)
    half = WeightStream(specs=SPECS, tensors=list(weights(2).items())[:2])
    with pytest.raises(SyncError, match="expected c as tensor 2 of 3, got the end"):
        publisher.publish(half, version=2)
    for engine in engines:
        assert engine.version == 1 and all(worker.is_incomplete for worker in engine.workers)
        assert engine.calls[-1].startswith("abandon: SyncError: publish: expected c")
    tensors = weights(3)
    publisher.publish(stream(tensors), version=3)
    assert_all_serve(engines, tensors)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_receipt_that_differs_names_engine_worker_and_tensor(start, transport, monkeypatch):
    publisher, engines = start(transport)
    receiver = receiver_class(transport)
    acknowledge = receiver.acknowledge

    def acknowledge_wrongly(self, digests):
        is_second = self._worker == 1
        wrong = {i: bytes(16) if is_second and i == 1 else d for i, d in digests.items()}
        acknowledge(self, wrong)

    monkeypatch.setattr(receiver, "acknowledge", acknowledge_wrongly)
    with pytest.raises(
        SyncError, match=r"http://127.0.0.1:2, worker 1, b: expected checksum .*0000"
    ):
        publisher.publish(stream(weights(1)), version=1)
    assert "finish" not in engines[0].calls + engines[1].calls


def test_what_was_not_sent_is_not_there(start, monkeypatch):
    publisher, engines = start("files", timeout=0.2)
    monkeypatch.setattr(sender_class("files"), "send", lambda self, bucket: None)
    with pytest.raises(SyncError, match=r"bucket 0: expected it from source 0 within 0\.2 s"):
        publisher.publish(stream(weights(1)), version=1)
    assert all(worker.is_incomplete for engine in engines for worker in engine.workers)


def test_a_sender_that_fails_while_the_engines_receive(start, monkeypatch):
    publisher, engines = start("shared_memory")

    def fail(self, bucket):
        raise SyncError("a cable was cut")

    monkeypatch.setattr(sender_class("shared_memory"), "send", fail)
    with pytest.raises(SyncError, match="a cable was cut"):
        publisher.publish(stream(weights(1)), version=1)
    assert engines[0].calls[-1] == "abandon: SyncError: a cable was cut"


@pytest.mark.parametrize("transport", ["collective", "files"])
def test_every_source_sends_its_own_buckets(transport: str) -> None:
    """No process holds all bytes; sources and workers run at the same time."""
    sources = [
        sender_class(transport)(source=i, num_sources=2, timeout_seconds=10.0) for i in (0, 1)
    ]
    workers = [receiver_class(transport)(worker=i, device=torch.device("cpu")) for i in (0, 1)]
    pieces = tuple(
        Piece(tensor=i, tensor_offset=0, bucket_offset=64 * i, nbytes=64) for i in range(3)
    )
    buckets = [Bucket(index=i, pieces=pieces, source=i % 2) for i in range(4)]
    transfer = Transfer(bucket_bytes=192, num_tensors=3, num_workers=(2,), hosts=("127.0.0.1",))

    def receive(worker: int, offer: Offer) -> list[list[int]]:
        seen = []
        workers[worker].connect(offer)
        for bucket in buckets:
            workers[worker].receive(bucket)
            seen.append(workers[worker].buffer(0, 192)[::64].tolist())
        workers[worker].acknowledge({i: bytes([worker, i] * 8) for i in range(2)})
        return seen

    def send(source: int, offers: tuple[Offer, ...], first_value: int) -> None:
        sources[source].connect(offers)
        for bucket in buckets[source::2]:
            for index in range(3):
                value = first_value + 10 * bucket.index + index
                sources[source].buffer(64 * index, 64).fill_(value)
            sources[source].send(bucket)

    with ThreadPoolExecutor(4) as pool:
        for first_value in (1, 51):
            offers = sources[0].offer(transfer)
            seen = [pool.submit(receive, i, offers[0]) for i in (0, 1)]
            for sent in [pool.submit(send, i, offers, first_value) for i in (0, 1)]:
                sent.result()
            expected = [[first_value + 10 * i + j for j in (0, 1, 2)] for i in range(4)]
            assert [each.result() for each in seen] == [expected, expected]
            assert sources[0].receipts()[1] == [bytes([1, 0] * 8), bytes([1, 1] * 8), bytes(16)]
    for side in (*sources, *workers):
        side.close()
        side.close()
