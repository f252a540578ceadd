"""How a row is divided among the ranks that share it, worked by hand; and that values come back in
the row's order, with a gradient for each rank's own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.learner.layout.context import RowShare, row_share
from tests.support.distributed import run_ranks


def group_of(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def share_of(borders: list[int], rank: int, size: int, num_sequences: int) -> RowShare:
    return row_share(torch.tensor(borders, dtype=torch.int32), num_sequences, group_of(rank, size))


def test_two_ranks_worked_by_hand() -> None:
    # Sequences of 4 and 8 positions: pieces of 1 and 2. Rank 0 has the outer ones, 1 the inner.
    first, second = (share_of([0, 4, 12], rank, 2, 2) for rank in range(2))
    assert first.own.tolist() == [0, 3, 4, 5, 10, 11]
    assert second.own.tolist() == [1, 2, 6, 7, 8, 9]
    assert first.order.tolist() == [0, 6, 7, 1, 2, 3, 8, 9, 10, 11, 4, 5]
    assert torch.equal(second.order, first.order)
    for share, offsets in ((first, [0, 3, 0, 6]), (second, [1, 2, 2, 4])):
        assert share.sequence.tolist() == [0, 0, 1, 1]
        assert share.offset.tolist() == offsets
        assert share.place.tolist() == [0, 1, 2, 4]
        assert share.length.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_position_is_on_one_rank(size: int) -> None:
    # The last entry is the row's padding: divided as well, but no sequence.
    borders = [0, 2 * size, 8 * size, 8 * size + 2 * size, 14 * size]
    shares = [share_of(borders, rank, size, 3) for rank in range(size)]
    everything = torch.cat([share.own for share in shares])
    assert torch.equal(everything.sort()[0], torch.arange(14 * size))
    assert all(len(share.own) == 14 for share in shares)
    assert torch.equal(everything[shares[0].order], torch.arange(14 * size))
    for share in shares:
        for index, place, offset, length in zip(
            share.sequence, share.place, share.offset, share.length, strict=True
        ):
            run = torch.arange(int(length))
            assert torch.equal(share.own[place + run], borders[index] + offset + run)


def test_one_rank_has_the_row() -> None:
    share = share_of([0, 3, 8, 10], 0, 1, 2)
    assert share.group is None
    values = torch.arange(10.0)
    assert share.select(values) is share.whole(values) is share.gather_row(values) is values
    assert (share.place.tolist(), share.length.tolist()) == ([0, 3], [3, 5])


def test_sequence_parallelism_divides_a_share_again() -> None:
    """Of 12 positions, 6 on each of two context ranks, 3 on each of two tensor-parallel ones."""
    borders = torch.tensor([0, 4, 12])
    kept = [
        row_share(borders, 2, group_of(rank, 2), group_of(part, 2)).select_divided(
            torch.arange(12) * 10
        )
        for rank in range(2)
        for part in range(2)
    ]
    assert [each.tolist() for each in kept] == [
        [0, 30, 40],
        [50, 100, 110],
        [10, 20, 60],
        [70, 80, 90],
    ]
    values = torch.arange(12.0)
    assert row_share(borders, 2, None).select_divided(values) is values


def _whole(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    share = row_share(torch.tensor([0, 4, 12]), 2, torch.distributed.group.WORLD)
    own = share.own.double().requires_grad_()
    row = share.whole(own)
    # Every rank computes the same from the whole row.
    (row * torch.arange(12.0) ** 2).sum().backward()
    return row.detach(), own.grad


def test_whole_rows_have_the_gradients_of_their_own_positions() -> None:
    for rank, (row, gradient) in enumerate(run_ranks(_whole, 2)):
        assert torch.equal(row, torch.arange(12.0, dtype=torch.float64))
        own = share_of([0, 4, 12], rank, 2, 2).own
        assert torch.equal(gradient, own.double() ** 2)
