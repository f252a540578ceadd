"""The code of the CUDA kernels, run on the CPU by lockstep.cpp: the bits of the C++ kernels.

What this cannot see: races between warps, the rounding of the GPU's own instructions, faults of
alignment in memory that the CPU may read, launch limits, speed.
"""

import ctypes
import itertools
import math
import subprocess

import pytest
import torch

from megatron_rl.ops import kernels
from megatron_rl.ops.broken_rows import NO_ROW, note_broken_rows
from megatron_rl.ops.node_layout import words_per_row
from tests.ops.rows import (
    DTYPES,
    TEMPERATURES,
    Native,
    assert_same_bits,
    bits_of,
    make_problem,
    pad_columns,
    run_shards,
)
from tests.ops.sources import CSRC, HERE

kernels.load()


class Lockstep:
    """The operators of the device code, with the signatures of `reference`."""

    def __init__(self, library):
        self.library = library

    def nodes(self, logits, labels, temperature, edges, rank, vocab_size, has_entropy):
        width = words_per_row(edges, vocab_size, has_entropy=has_entropy)
        words = torch.full((logits.shape[0], width), -1, dtype=torch.int32)
        self.library.nodes(
            *_rows(logits),
            ctypes.c_int64(logits.shape[0]),
            _pointer(labels),
            ctypes.c_float(temperature),
            *map(ctypes.c_int64, (edges[rank], edges[rank + 1], vocab_size)),
            ctypes.c_bool(has_entropy),
            _pointer(words),
            ctypes.c_int64(width),
        )
        return words

    def finish(self, words, labels, edges, vocab_size, has_entropy, is_counted=None, flag=None):
        num_ranks, num_rows, width = words.shape
        entropy = torch.empty(num_rows if has_entropy else 0)
        logprobs, total, maximum = (torch.empty(num_rows) for _ in range(3))
        exponent = torch.empty(num_rows, dtype=torch.int32)
        self.library.finish(
            _pointer(words),
            *map(ctypes.c_int64, (width, num_rows)),
            _pointer(labels),
            (ctypes.c_int64 * len(edges))(*edges),
            ctypes.c_int(num_ranks),
            ctypes.c_int64(vocab_size),
            ctypes.c_bool(has_entropy),
            *map(_pointer, (logprobs, entropy, exponent, total, maximum, is_counted, flag)),
        )
        return logprobs, entropy, exponent, total, maximum

    def gradient(
        self,
        logits,
        labels,
        incoming,
        exponent,
        total,
        temperature,
        first_column,
        vocab_size,
        grad_logits,
    ):
        pointer, _, row_bytes = _rows(grad_logits)
        self.library.gradient(
            *_rows(logits),
            *map(ctypes.c_int64, logits.shape),
            *map(_pointer, (labels, incoming, exponent, total)),
            ctypes.c_float(temperature),
            *map(ctypes.c_int64, (first_column, vocab_size)),
            pointer,
            row_bytes,
        )


def _pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _rows(logits):
    row_bytes = logits.stride(0) * logits.element_size()
    kind = ctypes.c_int(DTYPES.index(logits.dtype))
    return ctypes.c_void_p(logits.data_ptr()), kind, ctypes.c_int64(row_bytes)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("lockstep") / "lockstep.so"
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-Wall", "-Werror", "-shared", "-fPIC"]
    source = HERE / "lockstep.cpp"
    subprocess.run(["g++", *flags, f"-I{CSRC}", str(source), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.wide_loads.restype = ctypes.c_int64
    return library


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def lockstep(request, library):
    library.set_reversed(ctypes.c_bool(request.param))
    return Lockstep(library)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_device_code_has_the_bits_of_the_kernel(lockstep, dtype, temperature):
    torch.manual_seed(0)
    native = Native(kernels.instruction_set())
    sizes = [1, 2, 7, 8, 15, 17, 127, 128, 129, 300, 2047, 2048, 2049, 4097, 6200, 33000, 70001]
    for vocab_size, scale in itertools.product(sizes, [1.0, 30.0]):
        problem = make_problem(6, vocab_size, dtype, scale)
        layout = {"temperature": temperature, "edges": [0, vocab_size], "vocab_size": vocab_size}
        expected = run_shards(native, *problem, **layout)
        assert_same_bits(run_shards(lockstep, *problem, **layout), expected)
        without = run_shards(lockstep, *problem, **layout, has_entropy=False)
        assert_same_bits((without[0], *without[2:]), (expected[0], *expected[2:]))


def test_the_words_of_a_rank_are_the_kernels(lockstep):
    """All of them: padded words, and the nodes of either level."""
    torch.manual_seed(0)
    native = Native(kernels.instruction_set())
    edges = [0, 334, 5000, 5001, 5001, 40000, 81920, 90000]
    for vocab_size, has_entropy in itertools.product((81000, 90000), (True, False)):
        logits, labels, _ = make_problem(6, edges[-1], torch.bfloat16)
        labels %= vocab_size
        for rank, (begin, end) in enumerate(itertools.pairwise(edges)):
            given = (logits[:, begin:end], labels, 0.7, edges, rank, vocab_size, has_entropy)
            assert torch.equal(lockstep.nodes(*given), native.nodes(*given))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_code_at_the_size_of_a_model(lockstep, dtype):
    torch.manual_seed(0)
    logits, labels, incoming = make_problem(6, 151936, dtype)
    labels[0], labels[1] = 0, 151935
    whole = {"edges": [0, 151936], "vocab_size": 151936, "temperature": 1.0}
    native = Native(kernels.instruction_set())
    expected = run_shards(native, logits, labels, incoming, **whole)
    for num_ranks in (1, 3, 8, 64):
        width = -(-151936 // (128 * num_ranks)) * 128
        edges = [width * rank for rank in range(num_ranks + 1)]
        padded = pad_columns(logits, edges[-1])
        got = run_shards(lockstep, padded, labels, incoming, **whole | {"edges": edges})
        assert bits_of(got[-1][:, 151936:]).eq(0).all()
        assert_same_bits((*got[:-1], got[-1][:, :151936]), expected)


@pytest.mark.parametrize(
    ("edges", "vocab_size"),
    [
        ([0, 334, 668, 1002], 1000),
        ([0, 5, 10, 15], 7),
        ([0, 30, 60, 90, 100, 300, 300, 513, 2100, 2500], 2500),
        ([0, 1, 129, 130, 257, 4096, 6145], 6145),
        ([0, 3001, 6002, 9003], 5000),
        ([0, 64, 128, 192, 256], 201),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_cut_anywhere(lockstep, edges, vocab_size, dtype):
    torch.manual_seed(0)
    logits, labels, incoming = make_problem(6, vocab_size, dtype)
    logits = pad_columns(logits, edges[-1])
    whole = {"edges": [0, edges[-1]], "vocab_size": vocab_size, "temperature": 1.3}
    native = Native(kernels.instruction_set())
    expected = run_shards(native, logits, labels, incoming, **whole)
    got = run_shards(lockstep, logits, labels, incoming, **whole | {"edges": edges})
    assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_aligned(lockstep, dtype):
    """Any offset and stride, wide loads only where 16 bytes lie on their border."""
    torch.manual_seed(0)
    native = Native(kernels.instruction_set())
    storage = torch.randn(6 * 9000).to(dtype)
    labels, incoming = torch.randint(5000, (6,)), torch.randn(6)
    layout = {"temperature": 1.0, "edges": [0, 5000], "vocab_size": 5000}
    for stride, offset in itertools.product((5000, 5001, 5008, 8191), (0, 1, 3, 8)):
        logits = storage.as_strided((6, 5000), (stride, 1), offset)
        before = lockstep.library.wide_loads()
        got = run_shards(lockstep, logits, labels, incoming, **layout)
        are_some_wide = lockstep.library.wide_loads() > before
        assert_same_bits(got, run_shards(native, logits, labels, incoming, **layout))
        assert are_some_wide == any((stride * row + offset) % 8 == 0 for row in range(6)) or (
            dtype == torch.float32
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_over_the_logits(lockstep, dtype, temperature):
    torch.manual_seed(0)
    for vocab_size, num_columns in ((6200, 6200), (6001, 6144), (3, 128)):
        logits, labels, incoming = make_problem(12, vocab_size, dtype)
        layout = {"temperature": temperature, "edges": [0, num_columns], "vocab_size": vocab_size}
        logits = pad_columns(logits, num_columns)
        expected = run_shards(Native(kernels.instruction_set()), logits, labels, incoming, **layout)
        lockstep.gradient(
            logits, labels, incoming, *expected[2:4], temperature, 0, vocab_size, logits
        )
        assert torch.equal(bits_of(logits), bits_of(expected[-1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_entropy", [True, False])
def test_a_broken_row_is_told_by_its_maximum(lockstep, dtype, has_entropy):
    torch.manual_seed(0)
    largest = torch.finfo(dtype).max
    broken = [math.nan, -math.nan, math.inf, *([largest] if largest > 2.0**21 else [])]
    logits = torch.randn(40 * len(broken), 2500).to(dtype)
    logits[::2, torch.rand(2500) < 0.5] = -math.inf
    columns = torch.randint(2500, (len(logits),))
    logits[torch.arange(len(logits)), columns] = torch.tensor(broken).to(dtype).repeat(40)
    labels = torch.randint(2500, (len(logits),))
    largest = logits.float().amax(1).nan_to_num(nan=7.0, posinf=math.inf)
    for edges in ([0, 2500], [0, 1250, 2500]):
        words = [
            lockstep.nodes(logits[:, a:b], labels, 1.0, edges, rank, 2500, has_entropy)
            for rank, (a, b) in enumerate(itertools.pairwise(edges))
        ]
        finished = lockstep.finish(torch.stack(words), labels, edges, 2500, has_entropy)
        assert finished[0].isnan().all() and finished[1].isnan().all()
        assert torch.equal(finished[4].nan_to_num(nan=7.0, posinf=math.inf), largest)


def test_a_label_outside_the_vocabulary_has_no_logprob(lockstep):
    logits, labels = torch.zeros(3, 300), torch.tensor([-1, 5, 290])
    words = lockstep.nodes(logits, labels, 1.0, [0, 300], 0, 290, False)[None]
    logprobs = lockstep.finish(words, labels, [0, 300], 290, False)[0]
    assert logprobs.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("edges", [[0, 300], [0, 100, 200, 300]])
def test_the_flag_tells_the_first_broken_row(lockstep, edges):
    torch.manual_seed(0)
    sound = torch.randn(40, 300)
    cases = {  # row -> what breaks it; which rows count; the flag
        "none": ({}, None, NO_ROW),
        "logits": ({7: math.nan, 9: math.inf}, None, 2 * 7 + 1),
        "label": ({8: 290, 9: math.inf}, None, 2 * 8),
        "negative label": ({8: -1, 30: 5000}, None, 2 * 8),
        "out of reach": ({11: 2.2e6}, None, 2 * 11 + 1),
        "the last row": ({39: math.nan}, None, 2 * 39 + 1),
        "ignored": ({3: math.nan, 5: math.inf, 8: 290}, [3, 5], 2 * 8),
        "all ignored": ({3: math.nan}, [3], NO_ROW),
    }
    for name, (broken, ignored, expected) in cases.items():
        logits, labels = sound.clone(), torch.randint(290, (40,))
        for row, value in broken.items():
            if isinstance(value, int):
                labels[row] = value
            else:
                logits[row, 150] = value
        is_counted = None
        if ignored is not None:
            is_counted = torch.ones(40, dtype=torch.bool)
            is_counted[ignored] = False
        words = torch.stack(
            [
                lockstep.nodes(logits[:, a:b], labels, 1.0, edges, rank, 290, False)
                for rank, (a, b) in enumerate(itertools.pairwise(edges))
            ]
        )
        flag, twin = torch.tensor([NO_ROW]), torch.tensor([NO_ROW])
        maximum = lockstep.finish(words, labels, edges, 290, False, is_counted, flag)[4]
        note_broken_rows(maximum, labels, is_counted, 290, twin)
        assert int(flag) == int(twin) == expected, name
        # What an earlier call left is kept, where its row is the smaller one.
        for earlier in (0, 2 * 39 + 1):
            flag, twin = torch.tensor([earlier]), torch.tensor([earlier])
            lockstep.finish(words, labels, edges, 290, False, is_counted, flag)
            note_broken_rows(maximum, labels, is_counted, 290, twin)
            assert int(flag) == int(twin) == min(earlier, expected), name
