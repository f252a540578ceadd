"""Memory into which one bucket after another is received, and whose tensors need not be copied.

A tensor that refers to a bucket's memory keeps it from being written again, as long as it exists.
New memory of the host is slow (the kernel clears every page, at about a quarter of the speed of a
copy), therefore memory to which no tensor refers any more is used again.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

MAX_KEPT = 2  # memories that may be used again


class ReusedMemory:
    """Gives memory of one size on one device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._nbytes, self._device = nbytes, device
        # Memory, and an object that lives as long as a tensor refers to this memory.
        self._kept: list[tuple[np.ndarray, weakref.ref]] = []

    def take(self) -> torch.Tensor:
        """Memory to which no other tensor refers, [nbytes] uint8 of any content."""
        if self._device.type != "cpu":  # torch's own allocator uses memory again
            return torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
        free = [i for i, (_, referred) in enumerate(self._kept) if referred() is None]
        memory = self._kept.pop(free[0])[0] if free else np.empty(self._nbytes, np.uint8)
        view = memory[:]  # to which only the tensor's storage will refer
        self._kept = [*self._kept, (memory, weakref.ref(view))][-MAX_KEPT:]
        return torch.from_numpy(view)
