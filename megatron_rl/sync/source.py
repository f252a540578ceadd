"""The learner's tensors, piece by piece, into a bucket.

In: a lazy iterator of full tensors, as `learner/` gathers them. Out: their bytes in the wire's
dtype, and a checksum of each. The cast happens in the copy, so no second tensor is made for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.wire import CASTABLE, TensorSpec, new_checksum


class TensorSource:
    """Walks the learner's iterator in step with the plan, and holds it to the specs.

    Raises SyncError, from `copy` and `check_exhausted`, where the iterator yields something else.

    Args:
        specs: in the dtypes of the wire.
        tensors: full tensors in the same order; float32, float16 and bfloat16 are cast.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        self._specs = specs
        self._iterator = iter(tensors)
        self._index = -1
        self._flat = torch.empty(0)
        self._checksum = new_checksum()

    def copy(self, index: int, offset: int, target: torch.Tensor) -> str | None:
        """Cast bytes from `offset` of tensor `index` into `target`, [n] uint8.

        Returns the tensor's checksum when these were its last bytes.
        """
        if index != self._index:
            self._advance(index)
        spec = self._specs[index]
        first = offset // spec.dtype.itemsize
        count = target.numel() // spec.dtype.itemsize
        target.view(spec.dtype).copy_(self._flat[first : first + count])
        self._checksum.update(target.numpy())
        return self._checksum.hexdigest() if offset + target.numel() == spec.nbytes else None

    def check_exhausted(self) -> None:
        extra = next(self._iterator, None)
        if extra is not None:
            raise SyncError(
                f"publish: expected the {len(self._specs)} tensors of the specs, "
                f"got {extra[0]} after them"
            )

    def _advance(self, index: int) -> None:
        spec = self._specs[index]
        item = next(self._iterator, None)
        if item is None:
            raise SyncError(
                f"publish: expected {spec.name} as tensor {index} of {len(self._specs)}, "
                "got the end"
            )
        name, tensor = item
        if name != spec.name or tuple(tensor.shape) != spec.shape:
            raise SyncError(
                f"publish: expected {spec.name} {spec.shape} as tensor {index}, "
                f"got {name} {tuple(tensor.shape)}"
            )
        if tensor.dtype != spec.dtype and not _may_cast(tensor.dtype, spec.dtype):
            raise SyncError(f"publish: expected {spec.name} in {spec.dtype}, got {tensor.dtype}")
        self._index = index
        self._flat = tensor.detach().reshape(-1)  # a view, unless the learner's is not contiguous
        self._checksum = new_checksum()


def _may_cast(source: torch.dtype, target: torch.dtype) -> bool:
    return source in CASTABLE and target in CASTABLE
