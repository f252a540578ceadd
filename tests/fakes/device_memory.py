"""Memory of a GPU without one: shared memory of the host, whose handles are as many plain bytes."""

from __future__ import annotations

import struct

import pytest
import torch

from megatron_rl.sync.memory.device import HANDLE_BYTES
from megatron_rl.sync.memory.segment import Segment, SegmentAddress
from megatron_rl.sync.transports import ipc

LAYOUT = struct.Struct("<iiq28s")


class FakeDeviceMemory:
    """As `DeviceMemory`."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._segment = Segment.create(nbytes)
        self.tensor = self._segment.bytes_of(0, nbytes)
        address = self._segment.address
        packed = LAYOUT.pack(address.pid, address.fd, address.nbytes, address.name.encode())
        self.handle = packed.ljust(HANDLE_BYTES, b"\0")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._segment.close()


class FakeMappedMemory:
    """As `MappedMemory`."""

    def __init__(self, handle: bytes, device: torch.device) -> None:
        pid, fd, nbytes, name = LAYOUT.unpack(handle[: LAYOUT.size])
        address = SegmentAddress(pid=pid, fd=fd, nbytes=nbytes, name=name.decode())
        self._segment = Segment.open(address)

    def read(self, target: torch.Tensor) -> None:
        target.copy_(self._segment.bytes_of(0, target.numel()))

    def close(self) -> None:
        self._segment.close()


def use_fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the transport over CUDA IPC take the CPU for a GPU."""
    monkeypatch.setattr(ipc, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(ipc, "_source_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ipc, "DeviceMemory", FakeDeviceMemory)
    monkeypatch.setattr(ipc, "MappedMemory", FakeMappedMemory)
