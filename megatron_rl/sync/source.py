"""The sending half of the wire format: the learner's tensors in, bytes and checksums out.

In: a lazy iterator of full tensors, as `learner/` gathers them, and their specs, known beforehand.
Out: their bytes in the dtype of the wire, copied into a bucket piece by piece, and a checksum of
each. The copy casts too, so no second tensor is allocated for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_rl.config import QuantizationConfig
from megatron_rl.errors import SyncError
from megatron_rl.sync.wire import CASTABLE, TensorSpec, new_checksum
from megatron_rl.weights.quantization import quantized, quantized_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStream:
    """The tensors of one version of the weights, announced and then delivered.

    Example: `WeightStream(specs=(TensorSpec(name="model.norm.weight", ...),),
    tensors=iter([("model.norm.weight", torch.ones(256))]))`.
    """

    specs: tuple[TensorSpec, ...]  # in the learner's dtypes
    tensors: Iterable[tuple[str, torch.Tensor]]  # as announced, on any device; consumed once


def weight_stream(
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
) -> WeightStream:
    """What engines of this quantization are sent of a learner's tensors.

    Args:
        shapes: name and full shape of every tensor of the learner, in the order of `tensors`.
        tensors: the full tensors; asked for one at a time, when its turn has come.
        dtype: of all the learner's tensors.
    """
    announced = quantized_shapes(quantization, shapes, dtype)
    return WeightStream(
        specs=tuple(
            TensorSpec(name=name, dtype=of_tensor, shape=shape)
            for name, of_tensor, shape in announced
        ),
        tensors=quantized(quantization, tensors),
    )


class TensorSource:
    """Advances a stream's iterator as its bytes are asked for, and checks it against the specs.

    `copy` and `check_exhausted` raise SyncError where the iterator yields anything else.

    Args:
        specs: those of the stream in the dtypes of the wire.
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
        """Write the bytes of tensor `index` from `offset` on into `target`.

        Args:
            index: the tensor of the last call, or the one after it.
            offset: in bytes of the wire's dtype; the end of the last call's, or 0.
            target: [n] uint8, on any device.

        Returns:
            The tensor's checksum, hexadecimal, where these were its last bytes; else None.
        """
        if index != self._index:
            self._advance(index)
        spec = self._specs[index]
        first = offset // spec.dtype.itemsize
        count = target.numel() // spec.dtype.itemsize
        target.view(spec.dtype).copy_(self._flat[first : first + count])
        self._checksum.update(target.cpu().numpy())
        return self._checksum.hexdigest() if offset + target.numel() == spec.nbytes else None

    def check_exhausted(self) -> None:
        """Raise SyncError where the iterator has more tensors than were announced."""
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
