"""Attention over packed rows against torch's, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_rl.learner.layout.context import row_share
from megatron_rl.learner.model.attention import StackPlan, packed_attention, plan_stacks

HEADS, GROUPS, DIM = 4, 2, 16
SCALE = 0.3  # not the usual 1 / sqrt(dim)
Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def borders(lengths: list[int], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`cu_seqlens` and `cu_seqlens_padded`, each sequence with `padding` positions behind it."""
    real = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    padded = torch.tensor([0, *(each + padding for each in lengths)]).cumsum(0, dtype=torch.int32)
    return real, padded


def random_row(num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Row:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(num_tokens, heads, DIM, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )


def plan_of(lengths: list[int], num_tokens: int, padding: int = 0) -> StackPlan:
    real, padded = borders(lengths, padding)
    share = row_share(torch.cat([padded, padded.new_tensor([num_tokens])]), len(lengths), None)
    return plan_stacks(real, padded, share)


def attend(row: Row, lengths: list[int], padding: int = 0) -> torch.Tensor:
    return packed_attention(*row, plan_of(lengths, row[0].shape[0], padding), SCALE)


def alone(row: Row, start: int, length: int) -> torch.Tensor:
    """torch's attention over one sequence, [length, heads, dim]."""
    query, key, value = (part[None, start : start + length].transpose(1, 2) for part in row)
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=SCALE, enable_gqa=True
    )
    return output[0].transpose(0, 1)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    "lengths", [[1], [8], [5, 5, 6, 7], [300, 1, 256, 37, 37], [0, 4, 0, 9], [17, 0]]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)], ids=str
)
def test_each_sequence_gets_its_own_attention(
    lengths: list[int], padding: int, dtype: torch.dtype, tolerance: float
) -> None:
    num_tokens = sum(lengths) + padding * len(lengths) + 11
    row = random_row(num_tokens, dtype)
    output = attend(row, lengths, padding)
    assert (output.shape, output.dtype) == ((num_tokens, HEADS, DIM), dtype)
    expected = torch.zeros_like(output)
    starts = borders(lengths, padding)[1].tolist()
    for start, length in zip(starts, lengths):
        if length:
            expected[start : start + length] = alone(row, start, length)
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    if sum(lengths) == 0:
        return
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad((output * weights).sum(), row)
    wanted = torch.autograd.grad((expected * weights).sum(), row)
    for gradient, reference in zip(found, wanted):
        # Of a single token, the query's and the key's are zero but for rounding.
        error = (gradient.float() - reference.float()).norm()
        assert error <= tolerance * reference.float().norm().clamp(min=1.0)


@pytest.mark.parametrize("changed", [0, 1, 2, 3, "between"])
def test_no_bit_crosses_a_border(changed: int | str) -> None:
    """Another sequence, its length unchanged, or what stands in the padding: all else is equal."""
    lengths, padding = [20, 40, 20, 19], 2
    starts = borders(lengths, padding)[1].tolist()
    num_tokens = starts[-1] + 7
    row, other = random_row(num_tokens), random_row(num_tokens, seed=1)
    is_changed = torch.zeros(num_tokens, dtype=torch.bool)
    if changed == "between":
        is_changed[:] = True
        for start, length in zip(starts, lengths):
            is_changed[start : start + length] = False
        other = tuple(torch.full_like(part, torch.nan) for part in other)
    else:
        is_changed[starts[changed] : starts[changed] + lengths[changed]] = True
    mixed = tuple(
        torch.where(is_changed[:, None, None], new, old).detach().requires_grad_()
        for new, old in zip(other, row)
    )
    weights = torch.randn(num_tokens, HEADS, DIM, generator=torch.Generator().manual_seed(2))
    results = []
    for inputs in (row, mixed):
        output = attend(inputs, lengths, padding)
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for before, after in zip(*results):
        assert torch.equal(before[~is_changed], after[~is_changed])
        if changed != "between":
            assert not torch.equal(before[is_changed], after[is_changed])


def test_the_neighbours_and_the_place_change_no_bit() -> None:
    lengths = [30, 29, 64, 30]
    row = random_row(sum(lengths) + 5)
    packed = attend(row, lengths)
    start = 0
    for length in lengths:
        single = tuple(part[start : start + length] for part in row)
        assert torch.equal(attend(single, [length]), packed[start : start + length])
        start += length


def test_later_positions_are_not_seen() -> None:
    row = random_row(24)
    before = attend(row, [24])
    for part in row:
        part.data[17:] += 1.0
    after = attend(row, [24])
    assert torch.equal(before[:17], after[:17])
    assert not torch.equal(before[17:], after[17:])


def test_a_row_without_sequences_is_zero() -> None:
    assert not attend(random_row(9), []).any()


def test_positions_behind_a_sequence_are_zero_and_get_no_gradient() -> None:
    row = random_row(12)
    output = attend(row, [3, 4], padding=2)
    is_real = torch.tensor([True] * 3 + [False] * 2 + [True] * 4 + [False] * 3)
    assert not output[~is_real].any()
    assert output[is_real].abs().amin(dim=(1, 2)).all()
    for gradient in torch.autograd.grad(output.square().sum(), row):
        assert not gradient[~is_real].any()


def test_the_plan_of_the_docstring() -> None:
    plan = plan_of([3, 5], 9)
    [stack] = plan.stacks
    assert stack.queries.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0], [3, 4, 5, 6, 7, 3, 3, 3]]
    assert stack.keys is stack.queries
    assert stack.mask is None
    assert plan.scatter.tolist() == [0, 1, 2, 8, 9, 10, 11, 12, 16]
