"""The sending half of the wire format: converts the learner's tensors to bytes and checksums.

It reads full tensors from a lazy iterator, which `learner/` provides, and their specs, which are
known beforehand. It copies their bytes, in the wire dtype, into a bucket piece by piece, and
computes a checksum of each tensor. The copy casts at the same time, so that no second tensor is
allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_rl.config.rollout import QuantizationConfig
from megatron_rl.errors import SyncError
from megatron_rl.sync.wire import CASTABLE, TensorSpec, new_checksum
from megatron_rl.weights.quantization import quantized, quantized_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStream:
    """The tensors of one version of the weights: their specs, and an iterator of the tensors.

    Example: `WeightStream(specs=(TensorSpec(name="model.norm.weight", ...),),
    tensors=iter([("model.norm.weight", torch.ones(256))]))`.
    """

    specs: tuple[TensorSpec, ...]  # in the learner's dtypes
    tensors: Iterable[tuple[str, torch.Tensor]]  # in this order, on any device; consumed once


def weight_stream(
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
) -> WeightStream:
    """The stream that is sent to engines with this quantization, from the learner's tensors.

    Args:
        shapes: name and full shape of every tensor of the learner, in the order of `tensors`.
        tensors: the full tensors; each is requested only when it is needed.
        dtype: the dtype of all of the learner's tensors.
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
    """Advances a stream's iterator as bytes are requested, and compares tensors with the specs.

    `copy` and `check_exhausted` raise SyncError if the iterator's tensors do not match the specs.

    Args:
        specs: the stream's specs, with the wire dtypes.
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
        """Write the bytes of tensor `index`, starting at `offset`, into `target`.

        Args:
            index: the same tensor as in the last call, or the next one.
            offset: in bytes of the wire dtype; where the last call ended, or 0 for a new tensor.
            target: [n] uint8, on any device.

        Returns:
            The tensor's checksum, hexadecimal, if these were its last bytes; otherwise None.
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
        """Raise SyncError if the iterator has more tensors than were announced."""
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
        self._flat = tensor.detach().reshape(-1)  # a view if the tensor is contiguous
        self._checksum = new_checksum()


def _may_cast(source: torch.dtype, target: torch.dtype) -> bool:
    return source in CASTABLE and target in CASTABLE
