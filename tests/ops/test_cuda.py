"""The CUDA kernels on a GPU against the C++ kernels: zero differing bytes. tools/gpu_check.sh runs
them; test_device_code.py runs the same code without a GPU.
"""

import itertools
import json
import math

import pytest
import torch

from megatron_rl.errors import DataError, DivergenceError
from megatron_rl.ops import kernels
from megatron_rl.ops.broken_rows import check_broken_rows
from megatron_rl.ops.logprobs import token_logprobs, token_logprobs_and_entropy
from tests.ops import vectors
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

kernels.load()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        not torch.ops.megatron_rl.cuda_architectures(), reason="built without CUDA kernels"
    ),
]
NATIVE = Native(kernels.instruction_set())


class Cuda:
    """The operators on a GPU for tensors of the CPU, with the signatures of `reference`."""

    def nodes(self, logits, labels, *layout):
        operator = torch.ops.megatron_rl.token_logprobs_nodes
        return operator(_on_gpu(logits), labels.cuda(), *layout).cpu()

    def finish(self, words, labels, *layout):
        operator = torch.ops.megatron_rl.token_logprobs_finish
        return tuple(tensor.cpu() for tensor in operator(words.cuda(), labels.cuda(), *layout))

    def gradient(self, *given):
        *before, grad_logits = given
        moved = [_on_gpu(each) if isinstance(each, torch.Tensor) else each for each in before]
        gradient = torch.empty_like(moved[0], memory_format=torch.contiguous_format)
        torch.ops.megatron_rl.token_logprobs_gradient(*moved, gradient)
        grad_logits.copy_(gradient)


def _on_gpu(tensor):
    """With the same strides, and as far from a border of 16 bytes."""
    if tensor.dim() != 2 or tensor.numel() == 0:
        return tensor.cuda()
    offset = tensor.data_ptr() % 64 // tensor.element_size()
    length = offset + tensor.stride(0) * tensor.shape[0] + tensor.shape[1]
    storage = torch.empty(length, dtype=tensor.dtype, device="cuda")
    return storage.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gpu_has_the_bits_of_the_cpu(dtype, temperature):
    torch.manual_seed(0)
    sizes = [1, 2, 7, 8, 15, 17, 127, 128, 129, 300, 2047, 2048, 2049, 4097, 6200, 33000, 70001]
    for vocab_size, scale in itertools.product(sizes, [1.0, 30.0]):
        problem = make_problem(12, vocab_size, dtype, scale)
        layout = {"temperature": temperature, "edges": [0, vocab_size], "vocab_size": vocab_size}
        expected = run_shards(NATIVE, *problem, **layout)
        assert_same_bits(run_shards(Cuda(), *problem, **layout), expected)
        without = run_shards(Cuda(), *problem, **layout, has_entropy=False)
        assert_same_bits((without[0], *without[2:]), (expected[0], *expected[2:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ranks", [1, 3, 8, 64])
def test_shards_on_the_gpu(dtype, num_ranks):
    torch.manual_seed(0)
    logits, labels, incoming = make_problem(12, 151936, dtype)
    whole = {"edges": [0, 151936], "vocab_size": 151936, "temperature": 1.0}
    expected = run_shards(NATIVE, logits, labels, incoming, **whole)
    width = -(-151936 // (128 * num_ranks)) * 128
    edges = [width * rank for rank in range(num_ranks + 1)]
    padded = pad_columns(logits, edges[-1])
    got = run_shards(Cuda(), padded, labels, incoming, **whole | {"edges": edges})
    assert_same_bits((*got[:-1], got[-1][:, :151936]), expected)
    cut = [0, 334, 5000, 5001, 5001, 40000, 81920, 151936]
    got = run_shards(Cuda(), logits, labels, incoming, **whole | {"edges": cut})
    assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_aligned_on_the_gpu(dtype):
    torch.manual_seed(0)
    storage = torch.randn(6 * 9000).to(dtype)
    labels, incoming = torch.randint(5000, (6,)), torch.randn(6)
    layout = {"temperature": 1.0, "edges": [0, 5000], "vocab_size": 5000}
    for stride, offset in itertools.product((5000, 5001, 5008, 8191), (0, 1, 3, 8)):
        logits = storage.as_strided((6, 5000), (stride, 1), offset)
        expected = run_shards(NATIVE, logits, labels, incoming, **layout)
        assert_same_bits(run_shards(Cuda(), logits, labels, incoming, **layout), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_order_and_company_on_the_gpu(dtype):
    torch.manual_seed(0)
    logits, labels, incoming = make_problem(66, 20001, dtype)

    def work(rows, device, overwrite_logits=False):
        leaf = logits[rows].to(device).requires_grad_()
        logprobs, entropy = token_logprobs_and_entropy(
            leaf, labels[rows].to(device), temperature=0.7, overwrite_logits=overwrite_logits
        )
        logprobs.backward(incoming[rows].to(device))
        return [tensor.detach().cpu() for tensor in (logprobs, entropy, leaf.grad)]

    every = torch.arange(66)
    expected = work(every, "cpu")
    order = torch.randperm(66)
    alone = [work(every[row : row + 1], "cuda") for row in range(66)]
    for index, tensor in enumerate(expected):
        assert torch.equal(bits_of(work(every, "cuda")[index]), bits_of(tensor))
        assert torch.equal(bits_of(work(every, "cuda", True)[index]), bits_of(tensor))
        assert torch.equal(bits_of(work(order, "cuda")[index]), bits_of(tensor[order]))
        assert torch.equal(bits_of(torch.cat([one[index] for one in alone])), bits_of(tensor))


@pytest.mark.parametrize("num_rows", [70_000, 2_200_000])
def test_more_rows_than_one_grid_or_one_scratch_holds(num_rows):
    torch.manual_seed(0)
    logits, labels = torch.randn(num_rows, 128).bfloat16(), torch.randint(128, (num_rows,))
    leaf, twin = logits.cuda().requires_grad_(), logits.requires_grad_()
    got, expected = token_logprobs(leaf, labels.cuda()), token_logprobs(twin, labels)
    assert torch.equal(bits_of(got.detach().cpu()), bits_of(expected.detach()))
    got.sum().backward(), expected.sum().backward()
    assert torch.equal(bits_of(leaf.grad.cpu()), bits_of(twin.grad))


def test_broken_rows_and_labels_have_no_logprob_on_the_gpu():
    logits = torch.zeros(5, 3000, device="cuda")
    logits[0, 7], logits[1, 2999], logits[2] = math.nan, math.inf, -math.inf
    labels = torch.tensor([0, 1, 2, 3000, 3], device="cuda")
    assert token_logprobs(logits, labels).isnan().tolist() == [True, True, True, True, False]
    with pytest.raises(DivergenceError, match="here: logits of row 0"):
        check_broken_rows(logits.device, "here")
    check_broken_rows(logits.device, "here")  # told once
    token_logprobs(logits, torch.where(labels < 3, -100, labels), ignore_index=-100)
    with pytest.raises(DataError, match="here: label of row 3"):
        check_broken_rows(logits.device, "here")
    token_logprobs(logits[4:], labels[4:])
    check_broken_rows(logits.device, "here")


def test_the_current_stream_is_used():
    torch.manual_seed(0)
    logits, labels, _ = make_problem(64, 151936, torch.bfloat16)
    expected = token_logprobs(logits, labels)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # what the default stream would not wait for
        got = token_logprobs(logits.cuda(), labels.cuda())
    stream.synchronize()
    assert torch.equal(bits_of(got.cpu()), bits_of(expected))


def test_the_memory_beside_the_logits():
    logits = torch.zeros(4096, 151936, dtype=torch.bfloat16, device="cuda")
    labels = torch.zeros(4096, dtype=torch.int64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_logprobs(logits, labels)
    assert torch.cuda.max_memory_allocated() - before <= 64 * 2**20


def test_the_stored_bits_of_the_cpu():
    stored = json.loads(vectors.STORED.read_text())
    assert dict(vectors.checksums(torch.device("cuda"))) == stored
