"""What is asked of the CUDA runtime, with one that only writes down its calls; and that NVIDIA's
bindings, where they are installed, have the names that are used.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.memory import device
from megatron_rl.sync.memory.device import HANDLE_BYTES, DeviceMemory, MappedMemory

GPU = torch.device("cuda", 1)
HANDLE = bytes(range(HANDLE_BYTES))


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1


class Opaque:
    """A handle as the bindings hold it: bytes at an address."""

    def __init__(self, content: bytes = bytes(HANDLE_BYTES)) -> None:
        self._buffer = ctypes.create_string_buffer(content, HANDLE_BYTES)

    def getPtr(self) -> int:
        return ctypes.addressof(self._buffer)

    @property
    def content(self) -> bytes:
        return self._buffer.raw


class Runtime:
    """A runtime with one GPU, whose functions succeed unless they are in `failing`."""

    cudaError_t = Error
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    cudaIpcMemLazyEnablePeerAccess = 1
    cudaIpcMemHandle_t = Opaque

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing: set[str] = set()
        self.answers = {
            "cudaMalloc": 4096,
            "cudaIpcGetMemHandle": Opaque(HANDLE),
            "cudaIpcOpenMemHandle": 8192,
        }

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name in self.failing:
                return (Error.cudaErrorInvalidValue, None)
            answer = self.answers.get(name)
            return (Error.cudaSuccess,) if answer is None else (Error.cudaSuccess, answer)

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    monkeypatch.setattr(device, "_runtime", lambda: fake)
    stream = SimpleNamespace(cuda_stream=77, synchronize=lambda: fake.calls.append(("wait",)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    monkeypatch.setattr(torch, "as_tensor", lambda array, device: array.__cuda_array_interface__)
    return fake


def test_memory_is_allocated_shared_and_freed_once(runtime: Runtime) -> None:
    memory = DeviceMemory(256, GPU)
    assert memory.handle == HANDLE
    assert memory.tensor["data"] == (4096, False) and memory.tensor["shape"] == (256,)
    memory.flush()
    memory.close()
    memory.close()
    assert runtime.calls == [
        ("cudaSetDevice", 1),
        ("cudaMalloc", 256),
        ("cudaIpcGetMemHandle", 4096),
        ("wait",),
        ("cudaFree", 4096),
    ]


def test_memory_of_another_process_is_mapped_copied_and_unmapped(runtime: Runtime) -> None:
    mapped = MappedMemory(HANDLE, GPU)
    target = torch.zeros(16, dtype=torch.uint8)
    mapped.read(target)
    mapped.close()
    mapped.close()
    [_, (_, opaque, flag), copy, *rest] = runtime.calls
    assert opaque.content == HANDLE and flag == 1
    assert copy == ("cudaMemcpyAsync", target.data_ptr(), 8192, 16, 4, 77)
    assert rest == [("wait",), ("cudaIpcCloseMemHandle", 8192)]


def test_what_fails_is_told_and_nothing_is_kept(runtime: Runtime) -> None:
    runtime.failing = {"cudaIpcGetMemHandle"}
    expected = r"expected cudaIpcGetMemHandle to succeed, got cudaErrorInvalidValue; choose another"
    with pytest.raises(SyncError, match=expected):
        DeviceMemory(256, GPU)
    assert runtime.names[-1] == "cudaFree"
    runtime.failing = {"cudaIpcOpenMemHandle"}
    with pytest.raises(SyncError, match="on one host, on GPUs that reach each other"):
        MappedMemory(HANDLE, GPU)


def test_missing_bindings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(SyncError, match=r"expected the package cuda-bindings .*gpu\.lock"):
        DeviceMemory(256, GPU)


def has_bindings() -> bool:
    return bool(importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"))


@pytest.mark.skipif(not has_bindings(), reason="cuda-bindings is not installed")
def test_the_bindings_have_what_is_used() -> None:
    bindings = importlib.import_module("cuda.bindings.runtime")
    opaque = bindings.cudaIpcMemHandle_t()
    ctypes.memmove(opaque.getPtr(), HANDLE, HANDLE_BYTES)
    assert ctypes.string_at(opaque.getPtr(), HANDLE_BYTES) == HANDLE
    assert bindings.cudaError_t.cudaSuccess.name == "cudaSuccess"
    assert int(bindings.cudaMemcpyKind.cudaMemcpyDefault) == 4
    assert bindings.cudaIpcMemLazyEnablePeerAccess == 1
    code, *_ = bindings.cudaIpcGetMemHandle(0)
    assert code != bindings.cudaError_t.cudaSuccess
    for name in ("cudaSetDevice", "cudaMalloc", "cudaFree", "cudaIpcOpenMemHandle"):
        assert callable(getattr(bindings, name))
    assert callable(bindings.cudaIpcCloseMemHandle) and callable(bindings.cudaMemcpyAsync)
