"""What an update of weights looks like on the wire, whatever carries the bytes.

In: the ordered list of tensors a learner will publish. Out: a manifest (names, dtypes, shapes),
buckets of bounded size that say which bytes lie where, and checksums. All of it is plain JSON;
nothing is pickled. Sender and engine both use this file, so it imports neither vLLM nor Megatron.

Checksum: XXH3, 128 bits (Collet, xxHash 0.8). It guards against accidents (a torn copy, a stale
bucket, a race), not against an attacker: who may write to the engine at all is the bearer token's
business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from megatron_rl.errors import SyncError

ALIGNMENT = 64  # bytes; a multiple of every element size, and a cache line
DIGEST_BYTES = 16

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
# The engine rounds these to its own precision while it loads; every other dtype must match exactly.
CASTABLE = (torch.float32, torch.float16, torch.bfloat16)

new_checksum = xxhash.xxh3_128  # incremental: `.update(bytes-like)`, `.digest()`, `.hexdigest()`


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A full tensor, named as Hugging Face does.

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
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes of one tensor inside a bucket.

    Example: the second half of tensor 3, at the start of its bucket:
    `Piece(tensor=3, tensor_offset=65536, bucket_offset=0, nbytes=65536)`.
    """

    tensor: int  # index into the manifest
    tensor_offset: int  # bytes
    bucket_offset: int  # bytes, a multiple of ALIGNMENT
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What one call of `/update_weights` carries.

    Example: `Bucket(index=0, pieces=(Piece(...), Piece(...)))`.
    """

    index: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that an update will send, in order; the engine refuses to finish before it has seen the
    whole of it.

    Example: `Manifest(update="9f1c...", specs=(TensorSpec(...), ...))`; `update` names this one
        attempt.
    """

    update: str
    specs: tuple[TensorSpec, ...]


def wire_specs(specs: Sequence[TensorSpec], wire_dtype: torch.dtype | None) -> list[TensorSpec]:
    """The specs as they will be sent: floating tensors in `wire_dtype`, everything else as it is.

    Scales and zero points of quantised checkpoints keep their dtype: rounding a float32 scale to
    BF16 would change every weight of its channel. `wire_dtype=None` sends all as it is.
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


def plan_buckets(specs: Sequence[TensorSpec], bucket_bytes: int) -> list[Bucket]:
    """Lay the tensors into buckets of at most `bucket_bytes`, in order.

    A tensor is split only when it alone is larger than a bucket.
    """
    if bucket_bytes < ALIGNMENT or bucket_bytes % ALIGNMENT:
        raise SyncError(
            f"bucket size: expected a positive multiple of {ALIGNMENT} bytes, got {bucket_bytes}; "
            "change sync.bucket_mib"
        )
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    used = 0
    for index, spec in enumerate(specs):
        offset = 0
        while offset < spec.nbytes:
            start = -(-used // ALIGNMENT) * ALIGNMENT
            left = spec.nbytes - offset
            if pieces and start + left > bucket_bytes:
                buckets.append(Bucket(index=len(buckets), pieces=tuple(pieces)))
                pieces, used = [], 0
                continue
            nbytes = min(left, bucket_bytes - start)
            pieces.append(
                Piece(tensor=index, tensor_offset=offset, bucket_offset=start, nbytes=nbytes)
            )
            offset += nbytes
            used = start + nbytes
    if pieces:
        buckets.append(Bucket(index=len(buckets), pieces=tuple(pieces)))
    return buckets


def total_checksum(specs: Sequence[TensorSpec], checksums: Iterable[str]) -> str:
    """One checksum of everything: over names, dtypes, shapes and the tensors' own checksums, in
    order.

    Args:
        checksums: hexadecimal, one a spec, in the order of `specs`.
    """
    whole = new_checksum()
    for spec, checksum in zip(specs, checksums, strict=True):
        whole.update(f"{spec.name} {DTYPE_NAMES[spec.dtype]} {spec.shape} {checksum}\n".encode())
    return whole.hexdigest()


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "update": manifest.update,
        "tensors": [
            [spec.name, DTYPE_NAMES[spec.dtype], list(spec.shape), spec.nbytes]
            for spec in manifest.specs
        ],
    }


def manifest_from_json(value: dict[str, Any]) -> Manifest:
    """Raises SyncError on anything that `manifest_to_json` would not have written."""
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
    """`checksums`: of the tensors whose last piece lies in this bucket, by index into the
    manifest.
    """
    return {
        "index": bucket.index,
        "pieces": [
            [piece.tensor, piece.tensor_offset, piece.bucket_offset, piece.nbytes]
            for piece in bucket.pieces
        ],
        "checksums": {str(index): checksum for index, checksum in checksums.items()},
    }


def bucket_from_json(value: dict[str, Any]) -> tuple[Bucket, dict[int, str]]:
    """Raises SyncError on anything that `bucket_to_json` would not have written."""
    try:
        pieces = tuple(
            Piece(tensor=tensor, tensor_offset=start, bucket_offset=offset, nbytes=nbytes)
            for tensor, start, offset, nbytes in value["pieces"]
        )
        checksums = {int(index): str(checksum) for index, checksum in value["checksums"].items()}
        return Bucket(index=int(value["index"]), pieces=pieces), checksums
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SyncError(f"bucket: expected what sync/wire.py writes, got {error!r}") from error
