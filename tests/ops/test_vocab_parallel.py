import math

import pytest
import torch
from torch import distributed

from megatron_rl.errors import DataError, DivergenceError
from megatron_rl.ops.logprobs import linear_token_logprobs, token_logprobs_and_entropy
from megatron_rl.ops.vocab_parallel import VocabShard, vocab_shard
from tests.support.distributed import run_ranks

TEMPERATURE = 0.8


def test_shards_of_an_unsharded_vocabulary():
    assert vocab_shard(40, 33, None) == VocabShard(rank=0, edges=(0, 40), vocab_size=33)
    assert vocab_shard(40, None, None) == VocabShard(rank=0, edges=(0, 40), vocab_size=40)
    for wrong in (0, 41):
        with pytest.raises(ValueError, match="1 to 40"):
            vocab_shard(40, wrong, None)


def _problem(dtype, vocab_size, columns):
    torch.manual_seed(0)
    logits = (torch.randn(13, columns) * 5).to(dtype)
    logits[1] += 1000  # a maximum far from 0
    logits[2, : columns // 2] = -math.inf  # whole shards without a number
    logits[3, columns // 2 : vocab_size] = -math.inf
    logits[4, 3] = 1e4
    labels = torch.randint(vocab_size, (13,))
    labels[2], labels[3], labels[4] = columns // 2, 0, vocab_size - 1
    return logits, labels, torch.randn(13)


def _logprobs_of(logits, labels, incoming, vocab_size, group):
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(
        leaf, labels, temperature=TEMPERATURE, vocab_size=vocab_size, group=group
    )
    logprobs.backward(incoming)
    return logprobs.detach(), entropy, leaf.grad


def _sharded_logits(rank, dtype, vocab_size, columns):
    logits, labels, incoming = _problem(dtype, vocab_size, columns)
    shard = logits.chunk(distributed.get_world_size(), dim=1)[rank]
    return _logprobs_of(shard, labels, incoming, vocab_size, distributed.group.WORLD)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    # With 70 of 128 columns, the last of four ranks holds padding only; 5004 cut granules anywhere,
    # and 5120 none.
    ("dtype", "vocab_size", "columns"),
    [
        (torch.float32, 101, 104),
        (torch.bfloat16, 70, 128),
        (torch.float32, 5001, 5004),
        (torch.bfloat16, 4700, 5120),
    ],
)
def test_sharded_logits_equal_unsharded(world_size, dtype, vocab_size, columns):
    results = run_ranks(_sharded_logits, world_size, dtype, vocab_size, columns)
    expected = _logprobs_of(*_problem(dtype, vocab_size, columns), vocab_size, None)
    for logprobs, entropy, _ in results:
        assert torch.equal(logprobs, expected[0])
        assert torch.equal(entropy, expected[1])
    gradient = torch.cat([result[2] for result in results], dim=1)
    assert torch.equal(gradient, expected[2])
    assert gradient[:, vocab_size:].eq(0).all()


def _linear_problem():
    torch.manual_seed(0)
    return (
        torch.randn(45, 16),
        torch.randn(40, 16),
        torch.randint(37, (45,)),
        torch.randn(45),
    )


def _linear_of(hidden, weight, labels, incoming, group):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs = linear_token_logprobs(
        hidden, weight, labels, vocab_size=37, group=group, chunk_size=16
    )
    logprobs.backward(incoming)
    return logprobs.detach(), hidden.grad, weight.grad


def _sharded_linear(rank):
    hidden, weight, labels, incoming = _linear_problem()
    shard = weight.chunk(distributed.get_world_size())[rank]
    return _linear_of(hidden, shard, labels, incoming, distributed.group.WORLD)


@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_linear_equals_unsharded(world_size):
    results = run_ranks(_sharded_linear, world_size)
    expected = _linear_of(*_linear_problem(), None)
    for logprobs, grad_hidden, _ in results:
        torch.testing.assert_close(logprobs, expected[0], rtol=1e-6, atol=1e-6)
        # Summed over the group already: every rank holds the whole gradient of its hidden states.
        assert torch.equal(grad_hidden, results[0][1])
    error = (results[0][1] - expected[1]).norm() / expected[1].norm()
    assert error.item() < 1e-6
    gradient = torch.cat([result[2] for result in results])
    error = (gradient - expected[2]).norm() / expected[2].norm()
    assert error.item() < 1e-6


def _sequence_parallel_linear(rank):
    hidden, weight, labels, incoming = (tensor[:44] for tensor in _linear_problem())
    world_size = distributed.get_world_size()
    weight, own = weight.chunk(world_size)[rank], hidden.chunk(world_size)[rank]
    own, shard = own.clone().requires_grad_(), weight.clone().requires_grad_()
    group = distributed.group.WORLD
    logprobs = linear_token_logprobs(
        own, shard, labels, vocab_size=37, group=group, chunk_size=16, sequence_parallel=True
    )
    logprobs.backward(incoming)
    whole = _linear_of(hidden, weight, labels, incoming, group)
    return (logprobs.detach(), own.grad, shard.grad), whole


@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_shared_out_among_ranks_equal_whole_ones(world_size):
    results = run_ranks(_sequence_parallel_linear, world_size)
    for rank, ((logprobs, grad_hidden, grad_weight), whole) in enumerate(results):
        assert torch.equal(logprobs, whole[0])
        assert torch.equal(grad_weight, whole[2])
        torch.testing.assert_close(
            grad_hidden, whole[1].chunk(world_size)[rank], rtol=1e-6, atol=1e-7
        )


def _broken(rank, what):
    logits, labels = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
    if what == "label":
        labels[3] = 99
    elif rank == 1:
        logits[2, 5] = what
    try:
        token_logprobs_and_entropy(logits, labels, group=distributed.group.WORLD)
    except (DivergenceError, DataError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "row"), [(math.nan, "row 2"), (math.inf, "row 2"), ("label", "row 3")]
)
def test_every_rank_raises_what_one_of_them_holds(what, row):
    messages = run_ranks(_broken, 2, what)
    assert all(row in message for message in messages), messages


def _no_rows(rank):
    logits = torch.zeros(0, 8, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    group = distributed.group.WORLD
    logprobs, entropy = token_logprobs_and_entropy(logits, labels, group=group)
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.ones(8, 3, requires_grad=True)
    linear = linear_token_logprobs(hidden, weight, labels, group=group)
    (logprobs.sum() + linear.sum()).backward()
    return logprobs.shape, entropy.shape, weight.grad.sum().item()


def test_no_rows_on_any_rank():
    assert run_ranks(_no_rows, 2) == [((0,), (0,), 0.0)] * 2
