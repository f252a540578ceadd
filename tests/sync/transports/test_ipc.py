"""CUDA IPC as far as a CPU can run it: its protocol over memory of the host
(`tests/fakes/device_memory.py`), and what it refuses. Whole updates are in test_transport.py.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.memory.device import HANDLE_BYTES
from megatron_rl.sync.transports.ipc import Receiver, Sender, parse_handle
from megatron_rl.sync.transports.transport import Bucket, Offer, Piece, Transfer
from tests.fakes.device_memory import use_fake_device

CPU = torch.device("cpu")
TRANSFER = Transfer(bucket_bytes=128, num_tensors=3, num_workers=(1, 2), hosts=("127.0.0.1",) * 2)
PIECE = Piece(tensor=0, tensor_offset=0, bucket_offset=0, nbytes=100)
BUCKETS = [Bucket(index=index, pieces=(PIECE,)) for index in range(2)]


def make_sender(seconds: float = 1.0) -> Sender:
    return Sender(source=0, num_sources=1, timeout_seconds=seconds)


def over_http(offer: Offer) -> Offer:
    return json.loads(json.dumps(offer))


def test_a_handle_is_plain_bytes_in_hexadecimal(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_device(monkeypatch)
    handle = bytes(range(HANDLE_BYTES))
    assert parse_handle(handle.hex()) == handle
    with make_sender_closed() as sender:
        offer = over_http(sender.offer(TRANSFER)[0])
        assert len(parse_handle(offer["handle"])) == HANDLE_BYTES
    for wrong in ("", "00" * 63, "00" * 65, "zz" * HANDLE_BYTES, 7, None, [0] * HANDLE_BYTES):
        with pytest.raises(SyncError, match="expected a handle of 64 bytes in hexadecimal, got"):
            parse_handle(wrong)


def test_a_bucket_is_there_once_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_device(monkeypatch)
    with make_sender_closed(5.0) as sender:
        offers = sender.offer(TRANSFER)
        workers = [Receiver(worker=i, device=CPU) for i in (0, 0, 1)]
        for worker, engine in zip(workers, (0, 1, 1), strict=True):
            worker.connect(over_http(offers[engine]))
        for value, bucket in zip((7, 9), BUCKETS, strict=True):
            sender.buffer(0, 100).fill_(value)
            threads = [threading.Thread(target=each.receive, args=(bucket,)) for each in workers]
            for thread in threads:
                thread.start()
            time.sleep(0.05)
            assert all(thread.is_alive() for thread in threads)  # they wait
            sender.send(bucket)
            for thread in threads:
                thread.join(5.0)
            assert [each.buffer(64, 36).unique().tolist() for each in workers] == [[value]] * 3
        sender.buffer(0, 128).fill_(1)  # of the next bucket: the workers have copies
        assert workers[0].buffer(0, 1).tolist() == [9]
        workers[2].acknowledge({1: b"b" * 16})
        nothing = [bytes(16)] * 3
        assert sender.receipts() == [nothing, nothing, [bytes(16), b"b" * 16, bytes(16)]]
        again = sender.offer(TRANSFER)  # the next update: the same memory, no receipts, no buckets
        assert again == offers and sender.receipts() == [nothing] * 3
        for worker in workers:
            worker.close()
            worker.close()


def test_larger_memory_is_found_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_device(monkeypatch)
    with make_sender_closed() as sender:
        worker = Receiver(worker=0, device=CPU)
        before = sender.offer(TRANSFER)[0]
        worker.connect(over_http(before))
        larger = replace(TRANSFER, bucket_bytes=256)
        after = sender.offer(larger)[0]
        assert after["handle"] != before["handle"]
        worker.connect(over_http(after))
        restarted = Receiver(worker=0, device=CPU)
        restarted.connect(over_http(after))
        sender.buffer(0, 256).fill_(3)
        sender.send(BUCKETS[0])
        for each in (worker, restarted):
            each.receive(Bucket(index=0, pieces=(replace(PIECE, nbytes=256),)))
            assert each.buffer(255, 1).tolist() == [3]
            each.close()


def test_a_silent_learner_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_device(monkeypatch)
    with make_sender_closed(0.2) as sender:
        worker = Receiver(worker=0, device=CPU)
        worker.connect(over_http(sender.offer(TRANSFER)[0]))
        sender.send(BUCKETS[0])
        worker.receive(BUCKETS[0])
        with pytest.raises(SyncError, match=r"expected bucket 1 .* within 0\.18 s, got 1 buckets"):
            worker.receive(BUCKETS[1])
        worker.close()


def test_a_dead_learner_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_device(monkeypatch)
    with make_sender_closed() as sender:
        offer = over_http(sender.offer(TRANSFER)[0])
    worker = Receiver(worker=0, device=CPU)
    for _ in range(2):  # and not half connected after the first time
        with pytest.raises(SyncError, match="learner and engine must run on one host"):
            worker.connect(offer)
    with pytest.raises(SyncError, match="expected a connection, it is closed"):
        worker.receive(BUCKETS[0])


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (64, 65), (128, 1), (0, -1)])
def test_bytes_outside_are_refused(
    offset: int, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_device(monkeypatch)
    with make_sender_closed() as sender:
        worker = Receiver(worker=0, device=CPU)
        worker.connect(over_http(sender.offer(TRANSFER)[0]))
        for side in (sender, worker):
            with pytest.raises(SyncError, match="bucket: expected bytes within 128"):
                side.buffer(offset, nbytes)
        with pytest.raises(SyncError, match="receipt: expected one of 3 tensors, got 3"):
            worker.acknowledge({3: b"x" * 16})
        worker.close()
        with pytest.raises(SyncError, match="it is closed"):
            worker.buffer(0, 1)


def test_cpus_and_several_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SyncError, match=r"got 2; choose another sync\.transport"):
        Sender(source=0, num_sources=2, timeout_seconds=1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SyncError, match="expected a learner on a GPU, got one on the CPU"):
        make_sender().offer(TRANSFER)
    with pytest.raises(SyncError, match="expected engines on GPUs, worker 0 is on cpu"):
        Receiver(worker=0, device=CPU).connect({})


class make_sender_closed:
    """A sender that is closed at the end, twice."""

    def __init__(self, seconds: float = 1.0) -> None:
        self._sender = make_sender(seconds)

    def __enter__(self) -> Sender:
        return self._sender

    def __exit__(self, *_exception: object) -> None:
        self._sender.close()
        self._sender.close()
