"""Memory of the logits' size: that of the last tensor is taken again, once nobody uses it."""

import resource

import pytest
import torch

from megatron_rl.ops import kernels
from megatron_rl.ops.entropy import differentiable_entropy
from megatron_rl.ops.logprobs import token_logprobs
from megatron_rl.ops.support_logprobs import support_logprobs
from megatron_rl.records import Truncation


def truncated(logits, labels):
    return support_logprobs(logits, labels, truncation=Truncation(top_k=5)).logprobs


def entropy(logits, labels):
    return differentiable_entropy(logits)


@pytest.mark.parametrize("function", [token_logprobs, truncated, entropy])
def test_gradients_that_live_have_memory_of_their_own(function):
    torch.manual_seed(0)
    leaves = [torch.randn(64, 40_000).bfloat16().requires_grad_() for _ in range(3)]
    labels = torch.zeros(64, dtype=torch.int64)
    for leaf in leaves:
        function(leaf, labels).sum().backward()
    kept = [leaf.grad.clone() for leaf in leaves]
    del leaves[1]  # its memory may be taken, the others' not
    function(torch.randn(64, 40_000).bfloat16().requires_grad_(), labels).sum().backward()
    assert torch.equal(leaves[0].grad, kept[0])
    assert torch.equal(leaves[1].grad, kept[2])


def test_memory_is_taken_again_when_nobody_uses_it():
    logits = torch.zeros(64, 40_000)
    memory = kernels.empty_like(logits)
    address, view = memory.data_ptr(), memory[3:]
    del memory
    other = kernels.empty_like(logits)  # a view still uses the first one
    assert not view.data_ptr() <= other.data_ptr() < view.data_ptr() + view.nbytes
    assert other.data_ptr() != address
    address = other.data_ptr()
    del other
    fewer = kernels.empty_like(logits[:27])  # 4.1 of 9.8 MiB
    assert fewer.data_ptr() != address  # of a far larger one nothing
    del fewer
    whole = kernels.empty_like(logits)
    address = whole.data_ptr()
    del whole
    assert kernels.empty_like(logits[:50]).data_ptr() == address


def test_memory_that_is_taken_again_faults_no_page():
    logits = torch.zeros(64, 400_000, dtype=torch.bfloat16)  # 49 MiB
    kernels.empty_like(logits).zero_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kernels.empty_like(logits).zero_()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # of 12,500


def test_the_memory_is_as_an_empty_tensor():
    whole = torch.randn(60, 40_000)
    for logits in (whole[:, 30:], whole.T, whole[:0], whole.half(), whole[:3, :5]):
        memory = kernels.empty_like(logits)
        assert memory.shape == logits.shape and memory.dtype == logits.dtype
        assert memory.is_contiguous() and not memory.requires_grad
        assert memory.storage_offset() == 0
    operator = torch.ops.megatron_rl.empty_like_logits.default
    for logits in (whole, whole[:1, :9]):
        torch.library.opcheck(operator, (logits,), test_utils=("test_schema", "test_faketensor"))
