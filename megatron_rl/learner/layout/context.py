"""[imports megatron] Context parallelism: several ranks share each row. The only module that knows
how a row is divided, also by sequence parallelism.

Every sequence of a row is cut into 2 x CP equal pieces, and rank r of the CP ranks holds the pieces
r and 2 CP - 1 - r of each (Liu et al. 2023, arXiv 2310.01889, with the balanced order of
Transformer Engine's attention): the first pieces of a sequence attend to little and the last to
much, so that all ranks have the same work.

The ranks that share a row compute its loss from the log-probs of all of them (`whole`), each the
same loss, so that sums over a sequence are exact. In the backward pass each rank continues from its
own positions; the gradients of the weights are added over the ranks by Megatron's DDP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShare:
    """The positions of a row that this rank computes, and the pieces of sequences in them.

    Example of rank 0 of 2, with sequences of 4 and 8 positions: `RowShare(group=cp_group, own=[0,
    3, 4, 5, 10, 11], order=[0, 6, 7, 1, 2, 3, 8, 9, 10, 11, 4, 5], sequence=[0, 0, 1, 1],
    offset=[0, 3, 0, 6], place=[0, 1, 2, 4], length=[1, 1, 2, 2])`.
    """

    group: dist.ProcessGroup | None  # the ranks that share the row; None: this rank alone
    own: torch.Tensor  # [T / CP] int64: where each of this rank's positions is in the row
    # [T] int64: where each position of the row is in the ranks' own positions, concatenated
    order: torch.Tensor
    # one entry for each piece of a sequence on this rank, [N] int64:
    sequence: torch.Tensor  # its index in the row
    offset: torch.Tensor  # the piece's first position in the sequence
    place: torch.Tensor  # the piece's first position among this rank's own
    length: torch.Tensor  # positions, with padding
    # the tensor-parallel ranks that divide these positions among them (sequence parallelism) where
    # no layer needs them together, as in the routers of experts; None: each of them has all
    dividing: dist.ProcessGroup | None = None

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's part of the row's values: [T, ...] to [T / CP, ...]."""
        return values if self.group is None else values.index_select(0, self.own)

    def select_divided(self, values: torch.Tensor) -> torch.Tensor:
        """The part of the row's values that this rank has under sequence parallelism too: [T, ...]
        to [T / CP / TP, ...].
        """
        own = self.select(values)
        if self.dividing is None:
            return own
        return own.chunk(self.dividing.size())[self.dividing.rank()]

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """The row's values, from those that the ranks have for their own positions: [T / CP, ...]
        to [T, ...]. A collective over the ranks that share the row.

        In the backward pass each rank gets the gradient of its own values. It is complete, because
        every rank computes the same from the result.
        """
        return values if self.group is None else _Whole.apply(values, self)

    def gather_row(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all positions, [T, ...] in the order of the ranks (`order`), of [T / CP,
        ...] own ones. The gradients of all ranks are added in the backward pass.
        """
        if self.group is None:
            return values
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        return gather_from_sequence_parallel_region(values, group=self.group)


def row_share(
    borders: torch.Tensor,
    num_sequences: int,
    group: dist.ProcessGroup | None,
    dividing: dist.ProcessGroup | None = None,
) -> RowShare:
    """This rank's share of a row.

    Args:
        borders: [S+1] int32, or [S+2] with padding behind the last sequence, which is divided like
            a sequence: where each starts in the row, and the number of positions. All are multiples
            of 2 x CP.
        num_sequences: S.
        group: the ranks that share the row; None, or a group of one rank: this rank alone.
        dividing: as in `RowShare`.
    """
    borders = borders.long()
    starts, lengths = borders[:-1], borders[1:] - borders[:-1]
    numbers = torch.arange(num_sequences, device=borders.device)
    if group is None or group.size() == 1:
        everything = torch.arange(int(borders[-1]), device=borders.device)
        return RowShare(
            group=None,
            own=everything,
            order=everything,
            sequence=numbers,
            offset=torch.zeros_like(numbers),
            place=starts[:num_sequences],
            length=lengths[:num_sequences],
            dividing=dividing,
        )
    size, rank = group.size(), group.rank()
    pieces = lengths // (2 * size)  # the length of each sequence's pieces
    of_sequence = torch.repeat_interleave(torch.arange(len(pieces), device=borders.device), lengths)
    position = torch.arange(len(of_sequence), device=borders.device)
    piece = (position - starts[of_sequence]) // pieces[of_sequence]
    rank_of = torch.minimum(piece, 2 * size - 1 - piece)
    by_rank = rank_of.argsort(stable=True)
    order = torch.empty_like(by_rank)
    order[by_rank] = position
    length = pieces[:num_sequences].repeat_interleave(2)
    is_second = torch.arange(2 * num_sequences, device=borders.device) % 2
    place = (starts[:num_sequences] // size).repeat_interleave(2) + is_second * length
    number = torch.where(is_second == 1, 2 * size - 1 - rank, rank)
    return RowShare(
        group=group,
        own=(rank_of == rank).nonzero()[:, 0],
        order=order,
        sequence=numbers.repeat_interleave(2),
        offset=number * length,
        place=place,
        length=length,
        dividing=dividing,
    )


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, share: RowShare) -> torch.Tensor:
        ctx.share = share
        parts = [torch.empty_like(values) for _ in range(share.group.size())]
        dist.all_gather(parts, values.contiguous(), group=share.group)
        return torch.cat(parts).index_select(0, share.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_select(0, ctx.share.own), None


def replica_group(cp_group: dist.ProcessGroup, timeout: Any) -> dist.ProcessGroup:
    """The TP x CP x PP ranks that hold one replica of the model and share its rows. A collective
    over all ranks; Megatron's groups must exist.
    """
    from megatron.core import parallel_state

    if cp_group.size() == 1:
        return parallel_state.get_model_parallel_group()
    replica = parallel_state.get_data_parallel_rank()
    replicas: list[int] = [replica] * dist.get_world_size()
    dist.all_gather_object(replicas, replica)
    own = None
    for number in sorted(set(replicas)):  # every rank must create every group, in the same order
        ranks = [rank for rank, of_rank in enumerate(replicas) if of_rank == number]
        group = dist.new_group(ranks, timeout=timeout)
        own = group if number == replica else own
    return own
