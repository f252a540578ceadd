"""The wire format of a weight update, independent of the transport.

From the ordered list of tensors that a learner will publish, this module builds a manifest (names,
dtypes, shapes), buckets of bounded size that give the position of every byte, and checksums. All of
these are plain JSON; nothing is pickled. Sender and engine both use this module, so it imports
neither vLLM nor Megatron.

The checksum is XXH3 with 128 bits (Collet, xxHash 0.8). It detects accidents (a torn copy, a stale
bucket, a race), not attacks; the bearer token protects an engine against other writers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from megatron_rl.errors import SyncError
from megatron_rl.sync.transports.transport import ALIGNMENT, Bucket, Piece

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The engine rounds tensors of these dtypes to its own precision when it loads them. All other
# dtypes must match.
CASTABLE = (torch.float32, torch.float16, torch.bfloat16)

# Bytes are copied and added to a checksum in blocks of this size, which fit into a core's cache.
BLOCK_BYTES = 2**20

new_checksum = xxhash.xxh3_128  # incremental: `.update(bytes-like)`, `.digest()`, `.hexdigest()`


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A full tensor under its Hugging Face name.

    Example: `TensorSpec(name="model.norm.weight", dtype=torch.bfloat16, shape=(256,))`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise SyncError(
                f"{self.name}: expected a dtype of {', '.join(DTYPES)}, got {self.dtype}; "
                "sync/wire.py lists what the wire carries"
            )
        if math.prod(self.shape) == 0:
            raise SyncError(f"{self.name}: expected at least one element, got shape {self.shape}")

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All tensors that an update will send, in order. The engine refuses to finish the update
    before all of them have arrived.

    Example: `Manifest(update="9f1c...", specs=(TensorSpec(...), ...))`.
    """

    update: str  # a random id, different for every attempt
    specs: tuple[TensorSpec, ...]


def wire_specs(specs: Sequence[TensorSpec], wire_dtype: torch.dtype | None) -> list[TensorSpec]:
    """The specs with the dtypes in which the tensors are sent: `wire_dtype` for floating-point
    tensors, unchanged for the others.

    Scales and zero points of quantised checkpoints keep their dtype, because rounding a float32
    scale to BF16 would change every weight of its channel. `wire_dtype=None` changes nothing.

    Raises:
        SyncError: `wire_dtype` is not float32, float16 or bfloat16.
    """
    if wire_dtype is None:
        return list(specs)
    if wire_dtype not in CASTABLE:
        raise SyncError(f"wire dtype: expected float32, float16 or bfloat16, got {wire_dtype}")
    return [
        TensorSpec(name=spec.name, dtype=wire_dtype, shape=spec.shape) if _is_cast(spec) else spec
        for spec in specs
    ]


def _is_cast(spec: TensorSpec) -> bool:
    return spec.dtype in CASTABLE and not spec.name.endswith(
        ("_scale", "_scale_inv", "_zero_point", "_bias_correction", "e_score_correction_bias")
    )


def bucket_bytes_of(bucket_mib: float) -> int:
    """`sync.bucket_mib` in bytes, a multiple of ALIGNMENT."""
    return max(1, int(bucket_mib * 2**20) // ALIGNMENT) * ALIGNMENT


def plan_buckets(
    specs: Sequence[TensorSpec], bucket_bytes: int, sources: Sequence[int] = ()
) -> list[Bucket]:
    """Assign the tensors, in order, to buckets of at most `bucket_bytes`, each of one source.

    A tensor is split only when it alone is larger than a bucket.

    Args:
        sources: for each spec, the source that sends it; empty: source 0 sends all.

    Raises:
        SyncError: `bucket_bytes` is not a positive multiple of ALIGNMENT.
    """
    if bucket_bytes < ALIGNMENT or bucket_bytes % ALIGNMENT:
        raise SyncError(
            f"bucket size: expected a positive multiple of {ALIGNMENT} bytes, got {bucket_bytes}; "
            "change sync.bucket_mib"
        )
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    used = 0

    def close(source: int) -> None:
        buckets.append(Bucket(index=len(buckets), pieces=tuple(pieces), source=source))
        pieces.clear()

    source = 0
    for index, (spec, next_source) in enumerate(
        zip(specs, sources or [0] * len(specs), strict=True)
    ):
        if pieces and next_source != source:
            close(source)
            used = 0
        source, offset = next_source, 0
        while offset < spec.nbytes:
            start = -(-used // ALIGNMENT) * ALIGNMENT
            left = spec.nbytes - offset
            if pieces and start + left > bucket_bytes:
                close(source)
                used = 0
                continue
            nbytes = min(left, bucket_bytes - start)
            pieces.append(
                Piece(tensor=index, tensor_offset=offset, bucket_offset=start, nbytes=nbytes)
            )
            offset += nbytes
            used = start + nbytes
    if pieces:
        close(source)
    return buckets


def total_checksum(specs: Sequence[TensorSpec], checksums: Iterable[str]) -> str:
    """The checksum of a whole update, over the names, dtypes, shapes and checksums of its tensors.

    Args:
        checksums: hexadecimal, one per spec, in the order of `specs`.
    """
    whole = new_checksum()
    for spec, checksum in zip(specs, checksums, strict=True):
        whole.update(f"{spec.name} {DTYPE_NAMES[spec.dtype]} {spec.shape} {checksum}\n".encode())
    return whole.hexdigest()


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain JSON: `{"update": ..., "tensors": [[name, dtype, shape, nbytes]]}`."""
    return {
        "update": manifest.update,
        "tensors": [
            [spec.name, DTYPE_NAMES[spec.dtype], list(spec.shape), spec.nbytes]
            for spec in manifest.specs
        ],
    }


def manifest_from_json(value: dict[str, Any]) -> Manifest:
    """Parse the output of `manifest_to_json`; raises SyncError for any other input."""
    try:
        specs = []
        for name, dtype, shape, nbytes in value["tensors"]:
            spec = TensorSpec(name=str(name), dtype=DTYPES[dtype], shape=tuple(map(int, shape)))
            if spec.nbytes != nbytes:
                raise SyncError(f"{name}: expected {spec.nbytes} bytes by its shape, got {nbytes}")
            specs.append(spec)
        return Manifest(update=str(value["update"]), specs=tuple(specs))
    except (KeyError, TypeError, ValueError) as error:
        raise SyncError(f"manifest: expected what sync/wire.py writes, got {error!r}") from error


def bucket_to_json(bucket: Bucket, checksums: dict[int, str]) -> dict[str, Any]:
    """The bucket as plain JSON.

    Args:
        checksums: hexadecimal checksums of the tensors whose last piece is in this bucket, by index
            into the manifest.
    """
    return {
        "index": bucket.index,
        "source": bucket.source,
        "pieces": [
            [piece.tensor, piece.tensor_offset, piece.bucket_offset, piece.nbytes]
            for piece in bucket.pieces
        ],
        "checksums": {str(index): checksum for index, checksum in checksums.items()},
    }


def bucket_from_json(value: dict[str, Any]) -> tuple[Bucket, dict[int, str]]:
    """Parse the output of `bucket_to_json` into its arguments; raises SyncError for any other
    input, such as a bucket without pieces.
    """
    try:
        pieces = tuple(
            Piece(tensor=tensor, tensor_offset=start, bucket_offset=offset, nbytes=nbytes)
            for tensor, start, offset, nbytes in value["pieces"]
        )
        if not pieces:
            raise ValueError("a bucket without pieces")
        checksums = {int(index): str(checksum) for index, checksum in value["checksums"].items()}
        bucket = Bucket(index=int(value["index"]), pieces=pieces, source=int(value["source"]))
        return bucket, checksums
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SyncError(f"bucket: expected what sync/wire.py writes, got {error!r}") from error
