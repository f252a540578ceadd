"""GPU memory that processes of one host share by handles of CUDA IPC: 64 plain bytes, which another
process maps (CUDA Runtime API, "Device management", cudaIpcGetMemHandle and cudaIpcOpenMemHandle).

The memory comes from cudaMalloc and not from torch's allocator, since a handle is of a whole
allocation. A process may map the memory of a GPU that it does not see (CUDA_VISIBLE_DEVICES), so
that bytes are copied to a GPU of its own before they are used. Calls go through NVIDIA's
cuda-bindings.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch

from megatron_rl.errors import SyncError

HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE, the whole of a cudaIpcMemHandle_t


class DeviceMemory:
    """Memory of a GPU that this process shares with others.

    Args:
        device: a CUDA device, with its index.

    Raises:
        SyncError: the memory is not there, or cannot be shared.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._runtime, self._device = _runtime(), device
        self._pointer = 0
        _call(self._runtime, "cudaSetDevice", device.index)
        self._pointer = int(_call(self._runtime, "cudaMalloc", nbytes))
        try:
            handle = _call(self._runtime, "cudaIpcGetMemHandle", self._pointer)
            self.handle = ctypes.string_at(handle.getPtr(), HANDLE_BYTES)
            self.tensor = torch.as_tensor(_Array(self._pointer, nbytes), device=device)
        except BaseException:
            self.close()
            raise

    def flush(self) -> None:
        """Return when everything that was written on the current stream is there."""
        torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Free the memory; views of `tensor` must not be used any more. May be called twice."""
        pointer, self._pointer = self._pointer, 0
        if pointer:
            self.tensor = torch.empty(0, dtype=torch.uint8)
            _call(self._runtime, "cudaFree", pointer)


class MappedMemory:
    """Memory of a GPU that another process shares.

    Args:
        handle: HANDLE_BYTES bytes.
        device: of this process, on which its bytes will be needed.

    Raises:
        SyncError: the handle is not that of a living process on this host, or the two GPUs cannot
            reach each other.
    """

    def __init__(self, handle: bytes, device: torch.device) -> None:
        self._runtime, self._device = _runtime(), device
        self._pointer = 0
        _call(self._runtime, "cudaSetDevice", device.index)
        opaque = self._runtime.cudaIpcMemHandle_t()
        ctypes.memmove(opaque.getPtr(), handle, HANDLE_BYTES)
        flag = self._runtime.cudaIpcMemLazyEnablePeerAccess
        self._pointer = int(_call(self._runtime, "cudaIpcOpenMemHandle", opaque, flag))

    def read(self, target: torch.Tensor) -> None:
        """Copy the first bytes of the memory to `target`, [n] uint8 on the device; returns when
        they are there.
        """
        stream = torch.cuda.current_stream(self._device)
        _call(
            self._runtime,
            "cudaMemcpyAsync",
            *(target.data_ptr(), self._pointer, target.numel()),
            self._runtime.cudaMemcpyKind.cudaMemcpyDefault,
            stream.cuda_stream,
        )
        stream.synchronize()

    def close(self) -> None:
        """Unmap the memory. May be called twice."""
        pointer, self._pointer = self._pointer, 0
        if pointer:
            _call(self._runtime, "cudaIpcCloseMemHandle", pointer)


class _Array:
    """What torch takes as memory of a GPU (numba, "CUDA Array Interface", version 3)."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def _runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise SyncError(
            "sync.transport=ipc: expected the package cuda-bindings (requirements/gpu.lock), "
            f"{error}; install it, or choose another sync.transport"
        ) from error


def _call(runtime: Any, name: str, *arguments: Any) -> Any:
    """The result of a function of the CUDA runtime, which returns (error, result...)."""
    code, *results = getattr(runtime, name)(*arguments)
    if code != runtime.cudaError_t.cudaSuccess:
        hint = "choose another sync.transport"
        if name == "cudaIpcOpenMemHandle":
            hint = (
                f"learner and engine must be on one host, on GPUs that reach each other; or {hint}"
            )
        raise SyncError(f"CUDA IPC: expected {name} to succeed, got {code.name}; {hint}")
    return results[0] if results else None
