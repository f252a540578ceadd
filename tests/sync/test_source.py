from __future__ import annotations

import pytest
import torch

from megatron_rl.config import QuantizationConfig
from megatron_rl.errors import SyncError
from megatron_rl.sync.source import TensorSource, weight_stream
from megatron_rl.sync.wire import TensorSpec, new_checksum, plan_buckets


def collect(specs: list[TensorSpec], items: list, bucket_bytes: int = 64) -> dict[int, str]:
    """Checksums by index; the bytes of each tensor are checked on the way."""
    source, checksums = TensorSource(specs, items), {}
    raw = [torch.zeros(spec.nbytes, dtype=torch.uint8) for spec in specs]
    for bucket in plan_buckets(specs, bucket_bytes):
        for piece in bucket.pieces:
            end = piece.tensor_offset + piece.nbytes
            checksum = source.copy(
                piece.tensor, piece.tensor_offset, raw[piece.tensor][piece.tensor_offset : end]
            )
            if checksum is not None:
                checksums[piece.tensor] = checksum
    source.check_exhausted()
    for spec, (_, tensor), bytes_ in zip(specs, items, raw):
        assert torch.equal(bytes_.view(spec.dtype).view(spec.shape), tensor.to(spec.dtype))
    assert checksums == {i: new_checksum(b.numpy()).hexdigest() for i, b in enumerate(raw)}
    return checksums


def test_split_cast_and_transposed_tensors():
    tensor = torch.randn(9, 13, generator=torch.Generator().manual_seed(0))
    items = [
        ("a", tensor),
        ("b", tensor.T),
        ("c", (tensor * 9).to(torch.int8)),
        ("d", tensor[0, 0]),
    ]
    specs = [
        TensorSpec(name="a", dtype=torch.bfloat16, shape=(9, 13)),
        TensorSpec(name="b", dtype=torch.float32, shape=(13, 9)),
        TensorSpec(name="c", dtype=torch.int8, shape=(9, 13)),
        TensorSpec(name="d", dtype=torch.float32, shape=()),
    ]
    assert collect(specs, items) == collect(specs, items, bucket_bytes=4096)


def test_only_one_tensor_is_alive_at_a_time():
    """The learner gathers each tensor when it is asked for, and not before."""
    asked = []

    def gather():
        for index in range(4):
            asked.append(index)
            yield str(index), torch.full((16,), float(index))

    specs = [TensorSpec(name=str(i), dtype=torch.float32, shape=(16,)) for i in range(4)]
    source = TensorSource(specs, gather())
    for index in range(4):
        source.copy(index, 0, torch.empty(64, dtype=torch.uint8))
        assert asked == list(range(index + 1))


ONE = TensorSpec(name="a", dtype=torch.float32, shape=(2,))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "expected a as tensor 0 of 1, got the end"),
        ([("b", torch.zeros(2))], "expected a .*got b"),
        ([("a", torch.zeros(3))], r"expected a \(2,\) .*got a \(3,\)"),
        ([("a", torch.zeros(2, dtype=torch.int8))], "expected a in torch.float32, got torch.int8"),
        ([("a", torch.zeros(2)), ("b", torch.zeros(2))], "got b after them"),
    ],
)
def test_tensors_that_are_not_as_announced(items, message):
    with pytest.raises(SyncError, match=message):
        collect([ONE], items)


@pytest.mark.parametrize("kind", ["none", "int8", "fp8", "int4", "int8_w8a8"])
def test_a_stream_announces_what_it_delivers(kind):
    generator = torch.Generator().manual_seed(0)
    learned = {
        "model.embed_tokens.weight": torch.randn(5, 4, generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(6, 4, generator=generator),
    }
    asked = []

    def gather():
        for name, tensor in learned.items():
            asked.append(name)
            yield name, tensor.bfloat16()

    stream = weight_stream(
        [(name, tuple(tensor.shape)) for name, tensor in learned.items()],
        gather(),
        quantization=QuantizationConfig(format=kind),
        dtype=torch.bfloat16,
    )
    assert asked == []  # nothing is gathered before the first tensor is asked for
    delivered = list(stream.tensors)
    assert [(spec.name, spec.dtype, spec.shape) for spec in stream.specs] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in delivered
    ]
    assert len(delivered) == (3 if kind == "int8_w8a8" else 2)
    assert torch.equal(delivered[0][1], learned["model.embed_tokens.weight"].bfloat16())
