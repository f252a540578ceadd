from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.transports.shared_memory import (
    Receiver,
    Segment,
    SegmentAddress,
    Sender,
)
from megatron_rl.sync.transports.transport import Transfer

HOLDER = """
import sys, time
from megatron_rl.sync.transports.shared_memory import Segment
segment = Segment.create(4096)
segment.bytes_of(0, 4096).fill_(7)
address = segment.address
print(address.pid, address.fd, address.name, address.nbytes, flush=True)
time.sleep(60)
"""


def test_two_processes_share_it_and_sigkill_leaves_nothing():
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE) as holder:
        pid, fd, name, nbytes = holder.stdout.readline().split()
        address = SegmentAddress(pid=int(pid), fd=int(fd), name=name.decode(), nbytes=int(nbytes))
        mine = Segment.open(address)
        assert torch.equal(mine.bytes_of(0, 4096), torch.full((4096,), 7, dtype=torch.uint8))
        holder.send_signal(signal.SIGKILL)
    assert int(mine.bytes_of(4095, 1)) == 7  # still mapped here, so no crash of an engine
    with pytest.raises(SyncError, match="learner and engine must run on one host"):
        Segment.open(address)
    assert address.name in Path("/proc/self/maps").read_text()
    mine.close()
    assert address.name not in Path("/proc/self/maps").read_text()
    assert not [name for name in os.listdir("/dev/shm") if "megatron_rl" in name]


def test_writes_are_seen_by_the_other_side():
    mine = Segment.create(256)
    theirs = Segment.open(mine.address)
    theirs.bytes_of(16, 16).fill_(3)
    assert mine.bytes_of(0, 64).tolist() == [0] * 16 + [3] * 16 + [0] * 32
    theirs.close()
    mine.close()
    mine.close()


def test_it_cannot_shrink_under_the_engine():
    segment = Segment.create(4096)
    with pytest.raises(PermissionError):
        os.truncate(f"/proc/self/fd/{segment.address.fd}", 0)
    segment.close()


def test_an_address_that_means_something_else_is_refused(tmp_path: Path):
    segment = Segment.create(256)
    with pytest.raises(SyncError, match="expected other of 256 bytes"):
        Segment.open(dataclasses.replace(segment.address, name="other"))
    with pytest.raises(SyncError, match="of 512 bytes"):
        Segment.open(dataclasses.replace(segment.address, nbytes=512))
    with open(tmp_path / "megatron_rl.file", "wb+") as file:
        file.truncate(256)
        address = SegmentAddress(
            pid=os.getpid(), fd=file.fileno(), name="megatron_rl.file", nbytes=256
        )
        with pytest.raises(SyncError, match=r"expected megatron_rl\.file"):
            Segment.open(address)
    segment.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (250, 7), (0, 257), (0, -1)])
def test_bytes_outside_are_refused(offset, nbytes):
    segment = Segment.create(256)
    with pytest.raises(SyncError, match="expected bytes within 256"):
        segment.bytes_of(offset, nbytes)
    segment.close()


TRANSFER = Transfer(bucket_bytes=128, num_tensors=3, num_workers=(1, 2), hosts=("127.0.0.1",) * 2)


def make_sender() -> Sender:
    return Sender(source=0, num_sources=1, timeout_seconds=1.0)


def test_weights_of_several_sources_are_refused():
    with pytest.raises(SyncError, match=r"got 2; choose another sync\.transport"):
        Sender(source=0, num_sources=2, timeout_seconds=1.0)


def test_receipts_stand_behind_the_bucket_by_worker_and_tensor():
    sender = make_sender()
    first, second = sender.offer(TRANSFER)
    receiver = Receiver(worker=1, device=torch.device("cpu"))  # of the second engine
    receiver.connect(second)
    sender.buffer(0, 128).fill_(7)
    assert receiver.buffer(64, 64).tolist() == [7] * 64
    receiver.acknowledge({0: b"a" * 16, 2: b"c" * 16})
    nothing = [bytes(16)] * 3
    assert sender.receipts() == [nothing, nothing, [b"a" * 16, bytes(16), b"c" * 16]]
    assert sender.buffer(0, 128).tolist() == [7] * 128
    again = sender.offer(TRANSFER)  # the next update: the same memory, no receipts
    assert again == (first, second)
    assert sender.receipts() == [nothing] * 3
    receiver.close()
    sender.close()
    sender.close()


def test_a_larger_update_gets_larger_memory_and_a_restarted_engine_finds_it():
    sender = make_sender()
    (small,) = sender.offer(
        Transfer(bucket_bytes=64, num_tensors=1, num_workers=(1,), hosts=("127.0.0.1",))
    )
    receiver = Receiver(worker=0, device=torch.device("cpu"))
    receiver.connect(small)
    (large,) = sender.offer(
        Transfer(bucket_bytes=64, num_tensors=9, num_workers=(1,), hosts=("127.0.0.1",))
    )
    assert large["segment"] != small["segment"]
    receiver.connect(large)
    receiver.acknowledge({8: b"z" * 16})
    restarted = Receiver(worker=0, device=torch.device("cpu"))
    restarted.connect(large)
    restarted.acknowledge({0: b"y" * 16})
    assert [receipt[:1] for receipt in sender.receipts()[0]] == [b"y", *[b"\0"] * 7, b"z"]
    for side in (restarted, receiver, sender):
        side.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (64, 65), (128, 1)])
def test_a_bucket_cannot_reach_into_the_receipts(offset, nbytes):
    sender = make_sender()
    receiver = Receiver(worker=0, device=torch.device("cpu"))
    receiver.connect(sender.offer(TRANSFER)[0])
    for side in (sender, receiver):
        with pytest.raises(SyncError, match="bucket: expected bytes within 128"):
            side.buffer(offset, nbytes)
    for index in (-1, 3):
        with pytest.raises(SyncError, match=f"receipt: expected one of 3 tensors, got {index}"):
            receiver.acknowledge({index: b"x" * 16})
    receiver.close()
    with pytest.raises(SyncError, match="it is closed"):
        receiver.buffer(0, 1)
    sender.close()
