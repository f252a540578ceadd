"""The receiving half of the wire format: assembles buckets of bytes into complete, checked tensors.

It depends neither on vLLM nor on the transport. The manifest is compared with the engine's own
checkpoint, and the update with its manifest: each tensor must arrive exactly once, completely, in
the announced order and with the announced checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.transports.transport import Bucket, Piece
from megatron_rl.sync.wire import (
    BLOCK_BYTES,
    CASTABLE,
    DTYPE_NAMES,
    Manifest,
    TensorSpec,
    new_checksum,
)


def check_manifest(manifest: Manifest, expected: Mapping[str, TensorSpec]) -> None:
    """Compare an announced update with the tensors that the engine was built from, by name.

    Raises:
        SyncError: a name is unknown, missing or duplicated; a shape differs; or a dtype differs
            (only float32, float16 and bfloat16 may replace each other).
    """
    seen: set[str] = set()
    for spec in manifest.specs:
        wanted = expected.get(spec.name)
        if wanted is None:
            raise SyncError(
                f"{spec.name}: expected one of the {len(expected)} tensors of the engine's "
                "checkpoint (a tied lm_head is not one of them), got an unknown name"
            )
        if spec.name in seen:
            raise SyncError(f"{spec.name}: expected each name once, got it twice")
        seen.add(spec.name)
        if spec.shape != wanted.shape:
            raise SyncError(f"{spec.name}: expected shape {wanted.shape}, got {spec.shape}")
        if spec.dtype != wanted.dtype and not (spec.dtype in CASTABLE and wanted.dtype in CASTABLE):
            raise SyncError(
                f"{spec.name}: expected {DTYPE_NAMES[wanted.dtype]}, got {DTYPE_NAMES[spec.dtype]}"
            )
    missing = [name for name in expected if name not in seen]
    if missing:
        raise SyncError(
            f"manifest: expected all {len(expected)} tensors of the engine's checkpoint, "
            f"{len(missing)} are missing, the first is {missing[0]}"
        )


class Assembly:
    """Assembles the tensors of one update from its buckets.

    Args:
        manifest: already checked.
        read: `(bucket_offset, nbytes) -> [nbytes] uint8` view of the current bucket.
        is_memory_kept: `Receiver.is_memory_kept`. Otherwise tensors are copied, because the next
            bucket overwrites them while vLLM still holds the tensors of an incomplete layer.
    """

    def __init__(
        self,
        manifest: Manifest,
        read: Callable[[int, int], torch.Tensor],
        *,
        is_memory_kept: bool = False,
    ) -> None:
        self.manifest = manifest
        # Digests of the tensors that the last bucket completed, by index into the manifest.
        self.digests: dict[int, bytes] = {}
        self._read, self._is_memory_kept = read, is_memory_kept
        self._num_buckets = 0
        self._num_complete = 0  # tensors; the next expected piece belongs to this one
        # [nbytes] uint8 of that tensor, on the device of the bucket
        self._bytes: torch.Tensor | None = None
        self._offset = 0  # bytes of it that have arrived
        self._checksum = new_checksum()  # of these

    def tensors_of(
        self, bucket: Bucket, checksums: dict[int, str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of each tensor that this bucket completes, on the bucket's device. Later
        buckets do not change it.

        Args:
            checksums: hexadecimal checksums of these tensors, by index into the manifest.

        Raises:
            SyncError: a bucket or piece is out of order, or a checksum differs.
        """
        self.digests = {}
        if bucket.index != self._num_buckets:
            raise SyncError(f"bucket: expected number {self._num_buckets}, got {bucket.index}")
        for piece in bucket.pieces:
            spec = self._take(piece)
            if self._offset == spec.nbytes:
                yield spec.name, self._complete(spec, checksums)
        self._num_buckets += 1

    def check_complete(self) -> None:
        """Raise SyncError naming the first tensor that has not arrived, if there is one."""
        num_tensors = len(self.manifest.specs)
        if self._num_complete < num_tensors:
            raise SyncError(
                f"update: expected {num_tensors} tensors before its end, got {self._num_complete}; "
                "the first that did not arrive is "
                f"{self.manifest.specs[self._num_complete].name}"
            )

    def _take(self, piece: Piece) -> TensorSpec:
        if piece.tensor != self._num_complete or piece.tensor >= len(self.manifest.specs):
            raise SyncError(
                f"bucket: expected bytes of tensor {self._num_complete} of "
                f"{len(self.manifest.specs)}, got tensor {piece.tensor}"
            )
        spec = self.manifest.specs[piece.tensor]
        if (
            piece.tensor_offset != self._offset
            or piece.nbytes <= 0
            or piece.tensor_offset + piece.nbytes > spec.nbytes
        ):
            raise SyncError(
                f"{spec.name}: expected bytes from {self._offset} of {spec.nbytes}, "
                f"got {piece.tensor_offset} to {piece.tensor_offset + piece.nbytes}"
            )
        if self._offset == 0:
            self._bytes, self._checksum = None, new_checksum()
        is_copied = not self._is_memory_kept or piece.nbytes < spec.nbytes
        for start in range(0, piece.nbytes, BLOCK_BYTES):
            nbytes = min(BLOCK_BYTES, piece.nbytes - start)
            block = self._read(piece.bucket_offset + start, nbytes)
            if is_copied:
                if self._bytes is None:
                    self._bytes = torch.empty(spec.nbytes, dtype=torch.uint8, device=block.device)
                block = self._bytes[self._offset : self._offset + nbytes].copy_(block)
            self._checksum.update(block.cpu().numpy())  # of what will be loaded
            self._offset += nbytes
        if not is_copied:
            self._bytes = self._read(piece.bucket_offset, piece.nbytes)
        return spec

    def _complete(self, spec: TensorSpec, checksums: dict[int, str]) -> torch.Tensor:
        assert self._bytes is not None
        announced, found = checksums.get(self._num_complete), self._checksum.hexdigest()
        if found != announced:
            raise SyncError(f"{spec.name}: expected checksum {announced}, got {found}")
        self.digests[self._num_complete] = self._checksum.digest()
        tensor = self._bytes.view(spec.dtype).view(spec.shape)
        self._num_complete += 1
        self._bytes, self._offset = None, 0
        return tensor
