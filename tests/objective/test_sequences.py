import math

import torch

from megatron_rl.objective.sequences import (
    max_by_sequence,
    mean_by_sequence,
    num_sequences,
    sum_by_sequence,
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
