"""The states of a worker's weights: whole, or incomplete until a complete update has finished."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.receive import UpdateReceiver
from megatron_rl.sync.transports.shared_memory import Sender
from megatron_rl.sync.transports.transport import Transfer
from megatron_rl.sync.wire import (
    Manifest,
    TensorSpec,
    bucket_to_json,
    manifest_to_json,
    new_checksum,
    plan_buckets,
)

SPECS = tuple(TensorSpec(name=n, dtype=torch.float32, shape=(16,)) for n in ("a", "b"))
MANIFEST = manifest_to_json(Manifest(update="u", specs=SPECS))


class Worker:
    """An UpdateReceiver, its model, and the sender that it is connected to."""

    def __init__(self) -> None:
        self.model: dict[str, torch.Tensor] = {}
        self.update = UpdateReceiver(
            {spec.name: spec for spec in SPECS}, worker=0, device=torch.device("cpu")
        )
        self._sender = Sender(source=0, num_sources=1, timeout_seconds=1.0)

    def connect(self, num_tensors: int = 2) -> None:
        transfer = Transfer(
            bucket_bytes=64, num_tensors=num_tensors, num_workers=(1,), hosts=("127.0.0.1",)
        )
        self.update.connect("shared_memory", num_tensors, self._sender.offer(transfer)[0])

    def send(self, **message: Any) -> None:
        body = {"manifest": None, "bucket": None, "abandon": None} | message
        self.update.update(**body, load=self.model.update)

    def send_bucket(self, index: int, value: float) -> None:
        bucket = plan_buckets(SPECS, 64)[index]
        self._sender.buffer(0, 64).view(torch.float32).fill_(value)
        checksum = new_checksum(self._sender.buffer(0, 64).numpy()).hexdigest()
        self.send(bucket=bucket_to_json(bucket, {index: checksum}))

    def finish(self) -> None:
        self.update.check_complete()
        self.update.complete()

    def run(self, value: float) -> None:
        self.connect()
        self.update.start()
        self.send(manifest=MANIFEST)
        self.send_bucket(0, value)
        assert self.update.is_incomplete
        self.send_bucket(1, value)
        self.finish()
        assert not self.update.is_incomplete
        assert [tensor[0] for tensor in self.model.values()] == [value, value]


def test_a_whole_update_again_and_again():
    worker = Worker()
    worker.run(1.0)
    worker.run(2.0)


def test_no_start_without_a_connection():
    worker = Worker()
    with pytest.raises(SyncError, match="start: expected /init_weight_transfer_engine before it"):
        worker.update.start()
    assert not worker.update.is_incomplete


def test_nothing_is_loaded_without_a_start():
    worker = Worker()
    worker.run(1.0)
    for message in ({"manifest": MANIFEST}, {"abandon": "a test"}):
        with pytest.raises(SyncError, match="expected a start before it; the weights are whole"):
            worker.send(**message)
    assert not worker.update.is_incomplete


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"manifest": MANIFEST}, "expected buckets after the manifest, got a second"),
        ({"abandon": "the learner died"}, "the sender gave the update up: the learner died"),
        ({}, "expected a manifest, a bucket or abandon, got none of them"),
        ({"bucket": {"index": 1, "pieces": [], "checksums": {}}}, "a bucket without pieces"),
    ],
)
def test_a_failure_ends_the_update_and_the_next_one_mends_it(message, expected):
    worker = Worker()
    worker.run(1.0)
    worker.connect()
    worker.update.start()
    worker.send(manifest=MANIFEST)
    worker.send_bucket(0, 2.0)
    with pytest.raises(SyncError, match=expected):
        worker.send(**message)
    assert worker.update.is_incomplete
    with pytest.raises(SyncError, match=f"expected a start before it; .*{expected}"):
        worker.send_bucket(1, 2.0)
    with pytest.raises(SyncError, match=f"finish: .*the weights are incomplete: .*{expected}"):
        worker.finish()
    assert worker.update.is_incomplete
    worker.run(3.0)


def test_a_finish_too_early_leaves_the_weights_incomplete():
    worker = Worker()
    worker.connect()
    worker.update.start()
    with pytest.raises(SyncError, match=r"a manifest and its tensors before it; .*not finished"):
        worker.finish()
    worker.send(manifest=MANIFEST)
    worker.send_bucket(0, 1.0)
    with pytest.raises(SyncError, match="the first that did not arrive is b"):
        worker.finish()
    assert worker.update.is_incomplete


def test_a_bucket_before_the_manifest_and_a_manifest_of_another_size():
    worker = Worker()
    worker.connect()
    worker.update.start()
    with pytest.raises(SyncError, match="expected the manifest before the first bucket"):
        worker.send_bucket(0, 1.0)
    worker.connect(num_tensors=3)
    worker.update.start()
    with pytest.raises(SyncError, match="manifest: expected 3 tensors, got 2"):
        worker.send(manifest=MANIFEST)


class Refusing(dict):
    def update(self, tensors):
        next(iter(tensors))
        raise KeyError("no such parameter")


def test_an_error_of_the_model_is_one_of_the_update():
    worker = Worker()
    worker.connect()
    worker.update.start()
    worker.send(manifest=MANIFEST)
    worker.model = Refusing()
    with pytest.raises(KeyError, match="no such parameter"):
        worker.send_bucket(0, 1.0)
    assert worker.update.is_incomplete
    with pytest.raises(SyncError, match="its update failed: 'no such parameter'"):
        worker.finish()
