"""Memory is used again when no tensor refers to it, and not before."""

from __future__ import annotations

import torch

from megatron_rl.sync.memory.reused import ReusedMemory

CPU = torch.device("cpu")


def test_memory_is_used_again_after_its_last_tensor():
    memories = ReusedMemory(64, CPU)
    first = memories.take()
    assert first.shape == (64,) and first.dtype == torch.uint8
    place = first.data_ptr()
    part = first[:8].view(torch.float32)
    del first
    second = memories.take()
    assert second.data_ptr() != place
    del part
    assert memories.take().data_ptr() == place


def test_a_tensor_keeps_its_bytes_however_many_buckets_follow():
    memories = ReusedMemory(64, CPU)
    held = []
    for value in range(5):
        memory = memories.take()
        memory.fill_(value)
        held.append(memory[32:].view(torch.int64))
        del memory
    assert [part.view(torch.uint8).unique().tolist() for part in held] == [[i] for i in range(5)]
