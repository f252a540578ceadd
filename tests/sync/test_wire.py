from __future__ import annotations

import json

import pytest
import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.transports.transport import ALIGNMENT
from megatron_rl.sync.wire import (
    DTYPES,
    Manifest,
    TensorSpec,
    bucket_from_json,
    bucket_to_json,
    manifest_from_json,
    manifest_to_json,
    new_checksum,
    plan_buckets,
    total_checksum,
    wire_specs,
)


def spec(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def test_small_tensors_share_a_bucket_and_stay_whole():
    specs = [spec("a", 10), spec("b", 20), spec("c", 40)]  # 40, 80 and 160 bytes
    first, second = plan_buckets(specs, 256)
    assert [(p.tensor, p.bucket_offset, p.nbytes) for p in first.pieces] == [
        (0, 0, 40),
        (1, 64, 80),
    ]
    assert [(p.tensor, p.bucket_offset, p.nbytes) for p in second.pieces] == [(2, 0, 160)]


def test_a_tensor_larger_than_a_bucket_is_split():
    specs = [spec("a", 4), spec("b", 300), spec("c", 4)]  # b: 1200 bytes in buckets of 512
    buckets = plan_buckets(specs, 512)
    pieces = [p for bucket in buckets for p in bucket.pieces if p.tensor == 1]
    assert [(p.tensor_offset, p.nbytes) for p in pieces] == [(0, 512), (512, 512), (1024, 176)]
    assert [p.tensor for p in buckets[-1].pieces] == [1, 2]


@pytest.mark.parametrize("bucket_bytes", [64, 128, 4096])
def test_every_byte_once_in_order_and_within_bounds(bucket_bytes):
    generator = torch.Generator().manual_seed(0)
    specs = []
    for index, dtype in enumerate([*DTYPES.values()] * 3):
        shape = tuple(torch.randint(1, 9, (index % 3,), generator=generator).tolist())
        specs.append(spec(f"t{index}", *shape, dtype=dtype))
    buckets = plan_buckets(specs, bucket_bytes)
    sent = dict.fromkeys(range(len(specs)), 0)
    order = []
    for index, bucket in enumerate(buckets):
        assert bucket.index == index
        end = 0
        for piece in bucket.pieces:
            assert piece.bucket_offset % ALIGNMENT == 0 and piece.bucket_offset >= end
            end = piece.bucket_offset + piece.nbytes
            assert end <= bucket_bytes and piece.tensor_offset == sent[piece.tensor]
            sent[piece.tensor] += piece.nbytes
            order.append(piece.tensor)
    assert order == sorted(order)
    assert [sent[index] for index in range(len(specs))] == [s.nbytes for s in specs]


@pytest.mark.parametrize("bucket_bytes", [0, 63, 100])
def test_a_bucket_of_no_use_is_refused(bucket_bytes):
    with pytest.raises(SyncError, match="sync.bucket_mib".replace(".", r"\.")):
        plan_buckets([spec("a", 1)], bucket_bytes)


def test_manifest_and_buckets_survive_json():
    specs = tuple(spec(name, 3, 5, dtype=dtype) for name, dtype in DTYPES.items())
    manifest = Manifest(update="u", specs=(*specs, spec("scalar")))
    assert manifest_from_json(json.loads(json.dumps(manifest_to_json(manifest)))) == manifest
    for bucket in plan_buckets(manifest.specs, 64):
        checksums = {bucket.pieces[-1].tensor: "ab" * 16}
        value = json.loads(json.dumps(bucket_to_json(bucket, checksums)))
        assert bucket_from_json(value) == (bucket, checksums)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"update": "u", "tensors": [["a", "float31", [1], 4]]},
        {"update": "u", "tensors": [["a", "float32", [2], 4]]},
        {"update": "u", "tensors": [["a", "float32", [2]]]},
        {"update": "u", "tensors": [["a", "float32", [0], 0]]},
    ],
)
def test_a_broken_manifest_is_refused(value):
    with pytest.raises(SyncError):
        manifest_from_json(value)


def test_dtypes_that_the_wire_does_not_carry_are_refused():
    with pytest.raises(SyncError, match=r"expected a dtype of .*complex64"):
        spec("a", 1, dtype=torch.complex64)


def test_only_floating_weights_are_cast():
    specs = [
        spec("w.weight", 2),
        spec("q.weight", 2, dtype=torch.int8),
        spec("q.weight_scale", 2),
        spec("f.weight", 2, dtype=torch.float8_e4m3fn),
        spec("f.weight_scale_inv", 2),
    ]
    assert [s.dtype for s in wire_specs(specs, torch.bfloat16)] == [
        torch.bfloat16,
        torch.int8,
        torch.float32,
        torch.float8_e4m3fn,
        torch.float32,
    ]
    assert wire_specs(specs, None) == specs
    with pytest.raises(SyncError, match="wire dtype"):
        wire_specs(specs, torch.int8)


def test_checksum_is_xxh3_128():
    """Reference value of the xxHash project for the empty input."""
    assert new_checksum(b"").hexdigest() == "99aa06d3014798d86001c324468d497f"
    whole, parts = new_checksum(b"abcdef"), new_checksum()
    parts.update(b"abc")
    parts.update(b"def")
    assert whole.digest() == parts.digest()


def test_the_whole_checksum_sees_names_order_and_bytes():
    a, b = spec("a", 2), spec("b", 2)
    whole = total_checksum([a, b], ["1", "2"])
    assert whole == total_checksum([a, b], ["1", "2"])
    others = [([b, a], ["1", "2"]), ([a, b], ["1", "3"]), ([a, spec("b", 1, 2)], ["1", "2"])]
    assert all(total_checksum(*other) != whole for other in others)
