"""Reduces the tokens of a packed row to one number per sequence, and expands such numbers again.
All functions compute in float64, without gradient.
"""

from __future__ import annotations

import math

import torch


def num_sequences(sequence_ids: torch.Tensor) -> int:
    """The number of sequences S of a row, from its ids [T] int64, 0 to S-1, -1 on padding."""
    return int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0


def sums_by_index(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """The sums of the values of each index, added in a fixed order, which on a CPU is that of the
    values, so that they have the same bits each time. `index_add_` adds on a GPU in the order in
    which threads arrive.

    Args:
        values: [..., N] floating point.
        index: [N] int64, from 0 to size - 1.

    Returns:
        [..., size], of the values' dtype.
    """
    if not values.numel():
        return values.new_zeros(*values.shape[:-1], size)
    rows = values.reshape(-1, values.shape[-1])
    order = index.argsort(stable=True)
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    counts.index_add_(0, index, torch.ones_like(index))  # whole numbers: in any order the same
    sums = torch.segment_reduce(
        rows[:, order].flatten(), "sum", lengths=counts.repeat(len(rows)), unsafe=True
    )
    return sums.reshape(*values.shape[:-1], size)


def sum_by_sequence(
    values: torch.Tensor, mask: torch.Tensor, sequence_ids: torch.Tensor
) -> torch.Tensor:
    """The sum of the kept tokens' values, for each sequence.

    Args:
        values: [T] any real dtype. mask: [T] bool; values where it is False have no effect.
        sequence_ids: [T] int64, 0 to S-1, -1 on padding.

    Returns:
        [S] float64; 0 for a sequence without a kept token.
    """
    kept = torch.where(mask, values.detach().double(), 0.0)
    # Index 0 collects the padding, whose id is -1.
    return sums_by_index(kept, sequence_ids + 1, num_sequences(sequence_ids) + 1)[1:]


def max_by_sequence(
    values: torch.Tensor, mask: torch.Tensor, sequence_ids: torch.Tensor
) -> torch.Tensor:
    """Like `sum_by_sequence`, but the largest value; -inf for a sequence without a kept token."""
    kept = torch.where(mask, values.detach().double(), -math.inf)
    largest = kept.new_full((num_sequences(sequence_ids) + 1,), -math.inf)
    return largest.scatter_reduce_(0, sequence_ids + 1, kept, "amax")[1:]


def mean_by_sequence(
    values: torch.Tensor, mask: torch.Tensor, sequence_ids: torch.Tensor
) -> torch.Tensor:
    """[S] float64, the mean over the kept tokens; 0 for a sequence without one."""
    sums = sum_by_sequence(values, mask, sequence_ids)
    counts = sum_by_sequence(torch.ones_like(values), mask, sequence_ids)
    return sums / counts.clamp(min=1.0)


def to_tokens(of_sequences: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    """Expand [S] numbers or booleans to the tokens of their sequences, [T]; 0 on padding."""
    padded = torch.cat([of_sequences.new_zeros(1), of_sequences])
    return padded[sequence_ids + 1]
