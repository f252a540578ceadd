"""Memory of the logits' size comes in huge pages, where the machine has them."""

import re
import resource
from pathlib import Path

import pytest
import torch

from megatron_rl.ops import kernels
from megatron_rl.ops.entropy import differentiable_entropy
from megatron_rl.ops.logprobs import token_logprobs
from megatron_rl.ops.support_logprobs import support_logprobs
from megatron_rl.records import Truncation

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MEBIBYTE = 2**20

pytestmark = pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no transparent huge pages"
)


def mapping_of(tensor):
    """The lines of /proc/self/smaps about the middle of its memory."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    text = Path("/proc/self/smaps").read_text()
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        begin, end = (int(edge, 16) for edge in mapping.split()[0].split("-"))
        if begin <= address < end:
            return mapping
    raise AssertionError(f"no mapping holds {address:x}")


def has_asked(tensor):
    return " hg" in re.search(r"VmFlags:(.*)", mapping_of(tensor)).group(1)


def gradient_of(function, num_columns):
    leaf = torch.zeros(64, num_columns, dtype=torch.bfloat16, requires_grad=True)
    function(leaf, torch.zeros(64, dtype=torch.int64)).sum().backward()
    return leaf.grad


def truncated(logits, labels):
    return support_logprobs(logits, labels, truncation=Truncation(top_k=5)).logprobs


def entropy(logits, labels):
    return differentiable_entropy(logits)


@pytest.mark.parametrize("function", [token_logprobs, truncated, entropy])
def test_a_large_gradient_asks_for_huge_pages(function):
    assert has_asked(gradient_of(function, 300_000))


def test_a_small_one_does_not():
    logits = torch.zeros(64, 128)
    assert not has_asked(kernels.empty_like(logits))


def test_the_first_write_faults_a_huge_page_at_a_time():
    memory = kernels.empty_like(torch.empty(64, MEBIBYTE, dtype=torch.bfloat16))  # 128 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory.zero_()
    num_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    huge = int(re.search(r"AnonHugePages: +(\d+) kB", mapping_of(memory)).group(1)) * 1024
    if huge < memory.nbytes // 2:
        pytest.skip(f"the machine had huge pages for {huge} bytes only: its memory is fragmented")
    assert num_faults <= huge // (2 * MEBIBYTE) + (memory.nbytes - huge) // 4096 + 500


def test_the_memory_is_as_an_empty_tensor():
    whole = torch.randn(6, 400)
    for logits in (whole[:, 30:], whole.T, whole[:0], whole.half()):
        memory = kernels.empty_like(logits)
        assert memory.shape == logits.shape and memory.dtype == logits.dtype
        assert memory.is_contiguous()
    operator = torch.ops.megatron_rl.empty_like_logits.default
    torch.library.opcheck(operator, (whole,), test_utils=("test_schema", "test_faketensor"))
