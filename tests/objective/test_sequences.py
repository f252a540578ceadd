import math

import torch

from megatron_rl.objective.sequences import (
    max_by_sequence,
    mean_by_sequence,
    num_sequences,
    sum_by_sequence,
    sums_by_index,
    to_tokens,
)

# Sequence 0 keeps two of three tokens, 1 keeps none, 2 keeps its only one; then padding.
IDS = torch.tensor([0, 0, 0, 1, 2, -1, -1])
MASK = torch.tensor([True, False, True, False, True, False, False])
VALUES = torch.tensor([1.5, math.nan, -4.0, 7.0, 3.0, math.inf, 9.0])


def test_worked_by_hand():
    assert num_sequences(IDS) == 3
    assert sum_by_sequence(VALUES, MASK, IDS).tolist() == [-2.5, 0.0, 3.0]
    assert mean_by_sequence(VALUES, MASK, IDS).tolist() == [-1.25, 0.0, 3.0]
    assert max_by_sequence(VALUES, MASK, IDS).tolist() == [1.5, -math.inf, 3.0]
    assert to_tokens(torch.tensor([5.0, 6.0, 7.0]), IDS).tolist() == [5, 5, 5, 6, 7, 0, 0]
    assert to_tokens(torch.tensor([True, False, True]), IDS).tolist() == [True] * 3 + [
        False,
        True,
        False,
        False,
    ]


def test_a_row_of_padding_has_no_sequence():
    ids, nothing = torch.full((3,), -1), torch.zeros(3, dtype=torch.bool)
    assert num_sequences(ids) == 0
    assert sum_by_sequence(torch.ones(3), nothing, ids).tolist() == []
    assert max_by_sequence(torch.ones(3), nothing, ids).tolist() == []
    assert to_tokens(torch.zeros(0), ids).tolist() == [0.0] * 3


def test_sums_by_index_worked_by_hand():
    """In any order of the indices; one that does not occur has the sum 0."""
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.5, 0.25, 0.0, -1.0]])
    index = torch.tensor([3, 0, 3, 1])
    assert sums_by_index(values, index, 4).tolist() == [[2, 8, 0, 5], [0.25, -1, 0, 0.5]]
    assert sums_by_index(values[0], index, 4).tolist() == [2, 8, 0, 5]
    assert sums_by_index(values[:, :0], index[:0], 2).tolist() == [[0, 0], [0, 0]]
    assert sums_by_index(values[:, :0], index[:0], 0).shape == (2, 0)


def test_sums_are_added_in_the_order_of_the_values():
    """Numbers of which another order makes another sum: a large one last, or first."""
    values = torch.tensor([1.0, 2.0**-53, 2.0**-53, 1.0], dtype=torch.float64)
    index = torch.tensor([0, 1, 0, 1])
    sums = sums_by_index(torch.cat([values[2:3], values]), torch.cat([index[2:3], index]), 2)
    assert sums.tolist() == [2.0**-53 + 1.0, 1.0]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 500, generator=generator, dtype=torch.float64)
    index = torch.randint(0, 7, (500,), generator=generator)
    one_by_one = torch.zeros(3, 7, dtype=torch.float64)
    for number, where in enumerate(index.tolist()):
        one_by_one[:, where] += values[:, number]
    assert torch.equal(sums_by_index(values, index, 7), one_by_one)
