from __future__ import annotations

import pytest
import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.transports.shared_memory import Receiver, Sender
from megatron_rl.sync.transports.transport import Transfer

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
