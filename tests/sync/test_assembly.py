from __future__ import annotations

import pytest
import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync import assembly
from megatron_rl.sync.assembly import Assembly, check_manifest
from megatron_rl.sync.transports.transport import Bucket, Piece
from megatron_rl.sync.wire import Manifest, TensorSpec, new_checksum, plan_buckets

BUCKET_BYTES = 128
TENSORS = {
    "a": torch.arange(10, dtype=torch.float32),
    "b": torch.arange(150, dtype=torch.int8).view(10, 15),  # larger than a bucket
    "c": torch.tensor(2.5, dtype=torch.bfloat16),
}
SPECS = [
    TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
    for name, tensor in TENSORS.items()
]
EXPECTED = {spec.name: spec for spec in SPECS}
RAW = [tensor.reshape(-1).view(torch.uint8) for tensor in TENSORS.values()]
CHECKSUMS = {index: new_checksum(raw.numpy()).hexdigest() for index, raw in enumerate(RAW)}


class Wire:
    """A bucket of memory, and an assembly that reads it."""

    def __init__(self, *, is_memory_kept: bool = False) -> None:
        self.raw = list(RAW)  # what is sent
        self.memory = torch.zeros(BUCKET_BYTES, dtype=torch.uint8)
        self.digests: dict[int, str] = {}
        self.assembly = Assembly(
            Manifest(update="u", specs=tuple(SPECS)),
            lambda offset, nbytes: self.memory[offset : offset + nbytes],
            is_memory_kept=is_memory_kept,
        )

    def send(self, bucket: Bucket, checksums: dict[int, str] = CHECKSUMS) -> dict:
        self.memory.fill_(255)  # what an earlier bucket left
        for piece in bucket.pieces:
            sent = self.raw[piece.tensor][piece.tensor_offset :][: piece.nbytes]
            self.memory[piece.bucket_offset : piece.bucket_offset + piece.nbytes] = sent
        completed = dict(self.assembly.tensors_of(bucket, checksums))
        assert len(self.assembly.digests) == len(completed)
        self.digests |= {i: digest.hex() for i, digest in self.assembly.digests.items()}
        return completed


def test_whole_tensors_come_out_and_own_their_memory():
    wire, received = Wire(), {}
    for bucket in plan_buckets(SPECS, BUCKET_BYTES):
        received |= wire.send(bucket)
    wire.memory.zero_()
    wire.assembly.check_complete()
    assert list(received) == list(TENSORS)
    assert all(torch.equal(received[name], TENSORS[name]) for name in TENSORS)
    assert list(wire.digests.items()) == list(CHECKSUMS.items())


def test_tensors_are_copied_only_if_memory_is_used_again_or_a_bucket_has_half_of_them():
    wire, received = Wire(is_memory_kept=True), {}
    for bucket in plan_buckets(SPECS, BUCKET_BYTES):
        memory = wire.memory = torch.zeros(BUCKET_BYTES, dtype=torch.uint8)
        for name, tensor in wire.send(bucket).items():
            is_view = tensor.untyped_storage().data_ptr() == memory.data_ptr()
            assert is_view == (name != "b")
            received[name] = tensor
    assert all(torch.equal(received[name], TENSORS[name]) for name in TENSORS)
    assert list(wire.digests.items()) == list(CHECKSUMS.items())


@pytest.mark.parametrize("is_memory_kept", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_one_bit_that_was_flipped_on_the_way_is_found(monkeypatch, index, is_memory_kept):
    """In the last byte of a tensor that one bucket has, and of one that two buckets have."""
    monkeypatch.setattr(assembly, "BLOCK_BYTES", 16)
    wire = Wire(is_memory_kept=is_memory_kept)
    wire.raw[index] = wire.raw[index].clone()
    wire.raw[index][-1] ^= 1
    with pytest.raises(SyncError, match=f"{SPECS[index].name}: expected checksum"):
        for bucket in plan_buckets(SPECS, BUCKET_BYTES):
            wire.send(bucket)


def test_an_end_too_early_names_the_missing_tensor():
    wire = Wire()
    for bucket in plan_buckets(SPECS, BUCKET_BYTES)[:-1]:
        wire.send(bucket)
        with pytest.raises(SyncError, match="first that did not arrive is b"):
            wire.assembly.check_complete()


def test_a_bucket_out_of_turn():
    first, second, *_ = plan_buckets(SPECS, BUCKET_BYTES)
    wire = Wire()
    with pytest.raises(SyncError, match="expected number 0, got 1"):
        wire.send(second)
    wire = Wire()
    wire.send(first)
    with pytest.raises(SyncError, match="expected number 1, got 0"):
        wire.send(first)


@pytest.mark.parametrize("checksums", [{}, {0: "0" * 32}])
def test_a_wrong_or_absent_checksum(checksums):
    with pytest.raises(SyncError, match="a: expected checksum"):
        Wire().send(plan_buckets(SPECS, BUCKET_BYTES)[0], checksums)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ((1, 0, 0, 64), "expected bytes of tensor 0 of 3, got tensor 1"),
        ((0, 8, 0, 32), "a: expected bytes from 0 of 40, got 8 to 40"),
        ((0, 0, 0, 44), "a: expected bytes from 0 of 40, got 0 to 44"),
        ((0, 0, 0, 0), "a: expected bytes from 0 of 40"),
    ],
)
def test_a_piece_out_of_turn(piece, message):
    tensor, offset, start, nbytes = piece
    bad = Piece(tensor=tensor, tensor_offset=offset, bucket_offset=start, nbytes=nbytes)
    with pytest.raises(SyncError, match=message):
        dict(Wire().assembly.tensors_of(Bucket(index=0, pieces=(bad,)), CHECKSUMS))


def manifest_of(*specs: TensorSpec) -> Manifest:
    return Manifest(update="u", specs=specs)


def test_manifest_against_the_engine():
    a, b, c = SPECS
    check_manifest(manifest_of(c, a, b), EXPECTED)
    rounded = TensorSpec(name="a", dtype=torch.bfloat16, shape=(10,))
    check_manifest(manifest_of(rounded, b, c), EXPECTED)
    for specs, message in [
        ((a, b), "1 are missing, the first is c"),
        ((a, b, c, c), "c: expected each name once"),
        ((a, b, c, TensorSpec(name="d", dtype=a.dtype, shape=(1,))), "d: .*unknown name"),
        ((TensorSpec(name="a", dtype=a.dtype, shape=(5, 2)), b, c), "a: expected shape"),
        ((a, TensorSpec(name="b", dtype=torch.uint8, shape=(10, 15)), c), "b: expected int8"),
        ((a, TensorSpec(name="b", dtype=torch.float32, shape=(10, 15)), c), "b: expected int8"),
    ]:
        with pytest.raises(SyncError, match=message):
            check_manifest(manifest_of(*specs), EXPECTED)
