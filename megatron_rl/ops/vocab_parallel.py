"""Which columns of the vocabulary a tensor-parallel rank holds, and the collectives over them.

Every rank holds a contiguous shard of equally many columns, in rank order; columns added to make
the shards equal (as Megatron pads its embedding) stand at the end of the last ones and belong to no
token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """Example: 7 columns on rank 1 of 2, vocabulary of 11:
    `VocabShard(rank=1, edges=(0, 7, 14), vocab_size=11)`.
    """

    rank: int
    edges: tuple[int, ...]  # global columns at which the shards begin, and the end of the last one
    vocab_size: int  # V, without padding

    @property
    def start(self) -> int:
        """Global id of this rank's first column."""
        return self.edges[self.rank]


def vocab_shard(
    num_columns: int, vocab_size: int | None, group: distributed.ProcessGroup | None
) -> VocabShard:
    """This rank's share of the vocabulary.

    Args:
        num_columns: of this rank's shard, padding included; the same on every rank of the group.
        vocab_size: V without padding; None: every column of every rank counts.
        group: the tensor-parallel group, or None for an unsharded vocabulary.

    Raises:
        ValueError: a vocabulary that does not fit the shards.
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
    """Every rank's rows [N, W], of the same shape on each: [R, N, W] in rank order."""
    if group is None or group.size() == 1:
        return rows[None]
    gathered = rows.new_empty(group.size(), *rows.shape)
    if rows.numel() > 0:  # no rank has rows otherwise
        distributed.all_gather(list(gathered), rows.contiguous(), group=group)
    return gathered


def all_reduce_sum(tensor: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Elementwise sum over the group, in place."""
    if group is not None and group.size() > 1:
        distributed.all_reduce(tensor, op=distributed.ReduceOp.SUM, group=group)
    return tensor


def all_reduce_max(tensor: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Elementwise maximum over the group, in place."""
    if group is not None and group.size() > 1:
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=group)
    return tensor


def reduce_scatter_rows(rows: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Of the elementwise sum over the group of rows [R * N, W], this rank's N consecutive ones."""
    if group is None or group.size() == 1:
        return rows
    own = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    if rows.numel() > 0:  # no rank has rows otherwise
        distributed.reduce_scatter_tensor(own, rows.contiguous(), group=group)
    return own
