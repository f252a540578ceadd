"""Log-probs of a head of tokens beside the label's: values, one backward pass, shards, supports."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributed

from megatron_rl.errors import DataError
from megatron_rl.ops.head_logprobs import write_columns
from megatron_rl.ops.logprobs import token_logprobs
from megatron_rl.ops.support_logprobs import support_logprobs
from megatron_rl.records import Truncation
from tests.ops.rows import bits_of
from tests.support.distributed import run_ranks

WHOLE = Truncation()
NUM_ROWS, NUM_HEAD, VOCAB, COLUMNS = 11, 6, 300, 304


def problem(dtype=torch.float32):
    """Rows whose head holds the label or not, or fewer than K tokens, or none."""
    torch.manual_seed(0)
    logits = (torch.randn(NUM_ROWS, COLUMNS) * 3).to(dtype)
    logits[3] += 20
    logits[4, 7] = 30.0  # all of the mass
    labels = torch.randint(VOCAB, (NUM_ROWS,))
    head = torch.stack([torch.randperm(VOCAB)[:NUM_HEAD] for _ in range(NUM_ROWS)])
    head[:5, 2] = labels[:5]
    head[:5, 3:] = torch.tensor([[301 - 2, 0, 150]])
    labels[:5] = head[:5, 2] = torch.tensor([5, 6, 8, 9, 7])
    head[1, 4:] = -1
    head[5] = -1
    return logits, labels, head, torch.randn(NUM_ROWS), torch.randn(NUM_ROWS, NUM_HEAD)


def run(logits, labels, head, incoming, of_head, *, group=None, truncation=WHOLE, **how):
    """Log-probs, those of the head, and the gradient of their weighted sum."""
    leaf = logits.clone().requires_grad_()
    rows = leaf.clone() if how.get("overwrite_logits") else leaf
    output = support_logprobs(
        rows,
        labels,
        truncation=truncation,
        temperature=0.8,
        vocab_size=VOCAB,
        group=group,
        head=head,
        **how,
    )
    total = (output.logprobs * incoming).sum()
    if head is not None:
        total = total + (output.head_logprobs * of_head).sum()
    total.backward()
    return output.logprobs.detach(), output.head_logprobs, leaf.grad


def by_definition(logits, labels, head, incoming, of_head, kept=None):
    """The same in float64 by torch's autograd."""
    leaf = logits.double().requires_grad_()
    y = leaf[:, :VOCAB] / 0.8
    if kept is not None:
        y = torch.where(kept, y, -math.inf)
    logprobs = y.log_softmax(1)
    at_label = logprobs.gather(1, labels[:, None])[:, 0]
    at_head = torch.where(head >= 0, logprobs.gather(1, head.clamp(min=0)), 0.0)
    ((at_label * incoming).sum() + (at_head * of_head).sum()).backward()
    return at_label.detach(), at_head.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradient_are_those_of_the_definition(dtype):
    given = problem(dtype)
    logprobs, of_head, gradient = run(*given)
    expected = by_definition(*given)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(of_head.detach().double(), expected[1], rtol=2e-6, atol=2e-6)
    limit = 4e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gradient.double(), expected[2], rtol=limit, atol=2e-6)
    assert gradient.dtype == dtype
    assert gradient[:, VOCAB:].eq(0).all()


def test_a_token_of_the_head_has_the_bits_that_it_has_as_the_label():
    logits, labels, head, *weights = problem()
    _, of_head, _ = run(logits, labels, head, *weights)
    for column in range(NUM_HEAD):
        alone = token_logprobs(
            logits, head[:, column].clamp(min=0), temperature=0.8, vocab_size=VOCAB
        )
        is_there = head[:, column] >= 0
        assert torch.equal(bits_of(of_head[is_there, column]), bits_of(alone[is_there]))
        assert of_head[~is_there, column].eq(0).all()


def test_a_head_without_gradient_leaves_the_gradient_of_the_label():
    logits, labels, head, incoming, _ = problem()
    with_head = run(logits, labels, head, incoming, torch.zeros(NUM_ROWS, NUM_HEAD))
    alone = run(logits, labels, None, incoming, None)
    assert torch.equal(with_head[0], alone[0])
    torch.testing.assert_close(with_head[2], alone[2], rtol=1e-6, atol=1e-7)


def test_the_gradient_may_take_the_place_of_the_logits():
    given = problem()
    expected = run(*given)[2]
    assert torch.equal(run(*given, overwrite_logits=True)[2], expected)
    logits = given[0].clone().requires_grad_()
    output = support_logprobs(
        logits * 1.0, given[1], truncation=WHOLE, head=given[2], overwrite_logits=True
    )
    total = output.head_logprobs.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="expected one backward pass"):
        total.backward()


def test_ignored_rows_have_no_head():
    logits, labels, head, *weights = problem()
    labels[6] = -100
    logits[6] = math.nan
    logprobs, of_head, gradient = run(logits, labels, head, *weights, ignore_index=-100)
    assert logprobs[6] == 0 and of_head[6].eq(0).all() and gradient[6].eq(0).all()
    sound = [row for row in range(NUM_ROWS) if row != 6]
    whole = run(*problem())
    assert torch.equal(gradient[sound], whole[2][sound])


def test_the_head_stays_in_a_truncated_distribution():
    """top_k=2 leaves two columns, the label, and the head, which the engine could have chosen."""
    logits, labels, head, *weights = problem()
    logprobs, of_head, gradient = run(
        logits, labels, head, *weights, truncation=Truncation(top_k=2)
    )
    kept = torch.zeros(NUM_ROWS, VOCAB, dtype=torch.bool)
    kept.scatter_(1, logits[:, :VOCAB].topk(2).indices, True)
    kept.scatter_(1, labels[:, None], True)
    for row in range(NUM_ROWS):
        kept[row, head[row][head[row] >= 0]] = True
    expected = by_definition(logits, labels, head, *weights, kept=kept)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(of_head.detach().double(), expected[1], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected[2], rtol=2e-6, atol=2e-6)


def _sharded(rank, dtype, top_k):
    logits, *rest = problem(dtype)
    shard = logits.chunk(distributed.get_world_size(), dim=1)[rank].contiguous()
    truncation = Truncation(top_k=top_k)
    found = run(shard, *rest, group=distributed.group.WORLD, truncation=truncation)
    return tuple(each.detach() for each in found)


@pytest.mark.parametrize(("dtype", "top_k"), [(torch.bfloat16, 0), (torch.float32, 3)])
def test_sharded_equals_unsharded_to_the_bit(dtype, top_k):
    results = run_ranks(_sharded, 2, dtype, top_k)
    expected = run(*problem(dtype), truncation=Truncation(top_k=top_k))
    for logprobs, of_head, _ in results:
        assert torch.equal(logprobs, expected[0])
        assert torch.equal(of_head, expected[1])
    assert torch.equal(torch.cat([result[2] for result in results], dim=1), expected[2])


def test_no_rows():
    logits = torch.zeros(0, 8, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    output = support_logprobs(logits, nothing, truncation=WHOLE, head=torch.zeros(0, 3).long())
    (output.logprobs.sum() + output.head_logprobs.sum()).backward()
    assert output.head_logprobs.shape == (0, 3) and logits.grad.shape == (0, 8)


def test_what_a_head_may_not_be():
    logits, labels, head, *_ = problem()
    for wrong in (VOCAB, -2):
        bad = head.clone()
        bad[4, 1] = wrong
        with pytest.raises(
            DataError, match=f"head of row 4: .* 0 to 299, or -1 for none, got {wrong}"
        ):
            run(logits, labels, bad, *problem()[3:])
    for wrong in (head[:3], head.int(), head[:, 0]):
        with pytest.raises(ValueError, match=r"head: expected token ids \[11, K\] int64"):
            support_logprobs(logits, labels, truncation=WHOLE, vocab_size=VOCAB, head=wrong)


def test_written_columns_leave_the_others():
    target = torch.zeros(3, 4)
    columns = torch.tensor([[1, 0, 3], [0, 0, 0], [0, 2, 0]])
    is_local = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    write_columns(target, columns, is_local, torch.arange(1.0, 10.0).view(3, 3))
    assert target.tolist() == [[0, 1, 0, 3], [0, 0, 0, 0], [7, 0, 8, 0]]
