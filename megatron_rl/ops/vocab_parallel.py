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
    `VocabShard(start=7, width=4, vocab_size=11)`.
    """

    start: int  # global id of this rank's first column
    width: int  # columns of this rank that belong to the vocabulary; 0 when it holds only padding
    vocab_size: int  # V, without padding

    def locate(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where this rank holds the labels.

        Args:
            labels: [N] int64, global ids within the vocabulary.

        Returns:
            column [N] int64 within the shard, 0 for a label of another rank; is_local [N] bool.
        """
        column = labels - self.start
        is_local = (column >= 0) & (column < self.width)
        return torch.where(is_local, column, 0), is_local


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
    start = rank * num_columns
    width = min(max(vocab_size - start, 0), num_columns)
    return VocabShard(start=start, width=width, vocab_size=vocab_size)


def all_reduce_max(tensor: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Elementwise maximum over the group, in place; free of NaN (backends disagree on it)."""
    if group is not None and group.size() > 1:
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=group)
    return tensor


def all_reduce_sum(tensor: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Elementwise sum over the group, in place."""
    if group is not None and group.size() > 1:
        distributed.all_reduce(tensor, op=distributed.ReduceOp.SUM, group=group)
    return tensor
