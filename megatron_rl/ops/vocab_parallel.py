"""The columns of the vocabulary that each tensor-parallel rank holds, and the collectives over the
ranks.

Every rank holds a contiguous shard of the same number of columns, in rank order. The columns that
are added to make the shards equal (Megatron pads its embedding) are the last global ones and belong
to no token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """The shard of one rank.

    Example, of 7 columns on rank 1 of 2 and a vocabulary of 11:
    `VocabShard(rank=1, edges=(0, 7, 14), vocab_size=11)`.
    """

    rank: int
    edges: tuple[int, ...]  # [R + 1] first global column of each shard, and the end of the last
    vocab_size: int  # V, without padding

    @property
    def start(self) -> int:
        """Global id of this rank's first column."""
        return self.edges[self.rank]


def vocab_shard(
    num_columns: int, vocab_size: int | None, group: distributed.ProcessGroup | None
) -> VocabShard:
    """This rank's shard of the vocabulary.

    Args:
        num_columns: of this rank's shard with padding; the same on every rank of the group.
        vocab_size: V without padding; None: no column is padding.
        group: the tensor-parallel group, or None for an unsharded vocabulary.

    Raises:
        ValueError: `vocab_size` is below 1 or above the number of columns of all ranks.
    """
    rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
    capacity = num_columns * world_size
    if vocab_size is None:
        vocab_size = capacity
    if not 1 <= vocab_size <= capacity:
        raise ValueError(
            f"vocab_size: expected 1 to {capacity} ({num_columns} columns on each of {world_size} "
            f"ranks), got {vocab_size}; logits' last dimension must be this rank's shard"
        )
    edges = tuple(num_columns * shard for shard in range(world_size + 1))
    return VocabShard(rank=rank, edges=edges, vocab_size=vocab_size)


def gather_rows(rows: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """All-gather rows [N, W], of the same shape on every rank, to [R, N, W] in rank order."""
    if group is None or group.size() == 1:
        return rows[None]
    gathered = rows.new_empty(group.size(), *rows.shape)
    if rows.numel() > 0:  # else every rank is without rows and skips the collective
        distributed.all_gather(list(gathered), rows.contiguous(), group=group)
    return gathered


def all_reduce_sum(tensor: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Elementwise sum over the group, in place; returns `tensor`."""
    if group is not None and group.size() > 1:
        distributed.all_reduce(tensor, op=distributed.ReduceOp.SUM, group=group)
    return tensor


def all_reduce_max(tensor: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Elementwise maximum over the group, in place; returns `tensor`."""
    if group is not None and group.size() > 1:
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=group)
    return tensor


def reduce_scatter_rows(rows: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Sum rows [R * N, W] over the group and return this rank's N consecutive ones, [N, W]."""
    if group is None or group.size() == 1:
        return rows
    own = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    if rows.numel() > 0:  # else every rank is without rows and skips the collective
        distributed.reduce_scatter_tensor(own, rows.contiguous(), group=group)
    return own
