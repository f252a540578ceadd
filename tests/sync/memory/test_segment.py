"""Memory of one host that processes share, found by their number, and gone with them."""

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
from megatron_rl.sync.memory.segment import Receipts, Segment, SegmentAddress

HOLDER = """
import sys, time
from megatron_rl.sync.memory.segment import Segment
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


def test_receipts_lie_where_they_are_told() -> None:
    segment = Segment.create(16 + Receipts.nbytes_of(2, 3))
    receipts = Receipts(segment, 16, 2, 3)
    receipts.write(1, {0: b"a" * 16, 2: b"c" * 16})
    nothing = bytes(16)
    assert receipts.read() == [[nothing] * 3, [b"a" * 16, nothing, b"c" * 16]]
    assert segment.bytes_of(0, 16 + 3 * 16).tolist() == [0] * 64
    assert segment.bytes_of(64, 16).tolist() == [ord("a")] * 16
    receipts.clear()
    assert receipts.read() == [[nothing] * 3] * 2
    with pytest.raises(SyncError, match="receipt: expected one of 3 tensors, got 3"):
        receipts.write(0, {3: nothing})
    segment.close()
