"""The entropy under gradient, against float64 autograd, whole and over shards of the vocabulary."""

import math

import pytest
import torch
from torch import distributed

from megatron_rl.ops import entropy as entropy_module
from megatron_rl.ops.entropy import differentiable_entropy
from megatron_rl.ops.logprobs import token_logprobs_and_entropy
from tests.support.distributed import run_ranks

NUM_ROWS, VOCAB = 5, 131


def logits_of(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(NUM_ROWS, VOCAB, generator=generator) * 4
    logits[1, 7] = 60.0  # nearly certain
    logits[2] = 0.0  # uniform
    logits[3, 50:] = -math.inf  # columns that cannot be sampled
    return logits.to(dtype)


def exact(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy [N] and gradient of its weighted sum [N, V], float64."""
    wide = logits.double().requires_grad_()
    logprobs = (wide / temperature).log_softmax(-1)
    terms = torch.where(logprobs.isinf(), 0.0, logprobs.exp() * logprobs.clamp(min=-1e30))
    entropy = -terms.sum(-1)
    (gradient,) = torch.autograd.grad((entropy * weights()).sum(), wide)
    return entropy.detach(), gradient.nan_to_num(0.0)


def weights() -> torch.Tensor:
    return torch.arange(1.0, NUM_ROWS + 1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_value_and_gradient(temperature, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(entropy_module, "MAX_ELEMENTS", 2 * VOCAB)  # tiles of two rows
    logits = logits_of(dtype).requires_grad_()
    entropy = differentiable_entropy(logits, temperature=temperature)
    expected, gradient = exact(logits.detach(), temperature)
    assert entropy.dtype == torch.float32
    assert torch.allclose(entropy.double(), expected, rtol=2e-6, atol=2e-6)
    assert entropy[2].item() == pytest.approx(math.log(VOCAB), rel=1e-6)
    (entropy * weights()).sum().backward()
    assert logits.grad.dtype == dtype
    difference = (logits.grad.double() - gradient).norm() / gradient.norm()
    assert difference <= tolerance
    assert logits.grad[3, 50:].tolist() == [0.0] * (VOCAB - 50)


def test_it_is_the_entropy_that_the_kernel_gives():
    logits = logits_of()
    _, expected = token_logprobs_and_entropy(logits, torch.zeros(NUM_ROWS, dtype=torch.int64))
    assert torch.allclose(differentiable_entropy(logits), expected, rtol=1e-5, atol=1e-6)


def test_no_rows():
    logits = torch.zeros(0, 9, requires_grad=True)
    differentiable_entropy(logits).sum().backward()
    assert logits.grad.shape == (0, 9)


def on_a_shard(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = 72  # of two shards: 13 columns of padding behind the vocabulary
    padded = torch.full((NUM_ROWS, 2 * width), 9.0)
    padded[:, :VOCAB] = logits_of()
    shard = padded[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    entropy = differentiable_entropy(
        shard, temperature=0.7, vocab_size=VOCAB, group=distributed.group.WORLD
    )
    (entropy * weights()).sum().backward()
    return entropy.detach(), shard.grad


def test_shards_and_padding():
    (entropy, left), (other, right) = run_ranks(on_a_shard, 2)
    assert torch.equal(entropy, other)
    expected, gradient = exact(logits_of(), 0.7)
    assert torch.allclose(entropy.double(), expected, rtol=2e-6, atol=2e-6)
    got = torch.cat([left, right], -1)
    assert got[:, VOCAB:].abs().max() == 0
    assert (got[:, :VOCAB].double() - gradient).norm() / gradient.norm() <= 3e-6
