"""The sending half of the wire format: converts the learner's tensors to bytes and checksums.

It reads full tensors from a lazy iterator, which `learner/` provides, and their specs, which are
known beforehand. It copies their bytes, in the wire dtype, into a bucket piece by piece, and
computes a checksum of each tensor. The copy casts at the same time, so that no second tensor is
allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_rl.config.rollout import QuantizationConfig
from megatron_rl.errors import SyncError
from megatron_rl.sync.transports.transport import Bucket
from megatron_rl.sync.wire import BLOCK_BYTES, CASTABLE, TensorSpec, new_checksum
from megatron_rl.weights.quantization import quantized, quantized_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStream:
    """The tensors of one version of the weights: their specs, and an iterator of the tensors.

    Example: `WeightStream(specs=(TensorSpec(name="model.norm.weight", ...),),
    tensors=iter([("model.norm.weight", torch.ones(256))]))`.
    """

    specs: tuple[TensorSpec, ...]  # of all tensors, in the learner's dtypes
    # those that this process sends, in this order, on any device; consumed once
    tensors: Iterable[tuple[str, torch.Tensor]]
    sources: tuple[int, ...] = ()  # the source of each spec; empty: source 0 sends all


def weight_stream(
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    sources: Sequence[int] = (),
) -> WeightStream:
    """The stream that is sent to engines with this quantization, from the learner's tensors.

    Args:
        shapes: name and full shape of every tensor of the learner, in its order.
        tensors: the full tensors that this process sends; each is requested only when it is needed.
        dtype: the dtype of all of the learner's tensors.
        sources: for each of `shapes`, the source that sends it; empty: source 0 sends all.
    """
    named = list(shapes)
    specs, owners = [], []
    for each, owner in zip(named, sources or [0] * len(named), strict=True):
        for name, of_tensor, shape in quantized_shapes(quantization, [each], dtype):
            specs.append(TensorSpec(name=name, dtype=of_tensor, shape=shape))
            owners.append(owner)
    return WeightStream(
        specs=tuple(specs), tensors=quantized(quantization, tensors), sources=tuple(owners)
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
        for block in target.view(spec.dtype).split(BLOCK_BYTES // spec.dtype.itemsize):
            block.copy_(self._flat[first : first + block.numel()])
            self._checksum.update(block.view(torch.uint8).cpu().numpy())
            first += block.numel()
        return self._checksum.hexdigest() if offset + target.numel() == spec.nbytes else None

    def fill(self, bucket: Bucket, buffer: Callable[[int, int], torch.Tensor]) -> dict[int, str]:
        """Copy a bucket's bytes. Returns the checksums of the tensors that end in the bucket, by
        index.

        Args:
            buffer: `(offset, nbytes)` to where a piece's bytes go, as `Sender.buffer`.
        """
        completed = {}
        for piece in bucket.pieces:
            target = buffer(piece.bucket_offset, piece.nbytes)
            checksum = self.copy(piece.tensor, piece.tensor_offset, target)
            if checksum is not None:
                completed[piece.tensor] = checksum
        return completed

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
