"""[imports megatron] A row's positions as the routers of this rank see them."""

from __future__ import annotations

import torch

from megatron_rl.learner.layout.context import RowShare
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.routing import BalanceScales, RouterStatistics, RowRouting
from megatron_rl.records import MicroBatch


def row_routing(
    row: MicroBatch,
    share: RowShare,
    parallel: Parallel,
    *,
    scales: BalanceScales | None = None,
    statistics: RouterStatistics | None = None,
) -> RowRouting:
    """The row's routing on this rank.

    Args:
        share: the positions of the row that the rank computes.
        scales, statistics: as in `RowRouting`.
    """
    lengths = (row.cu_seqlens[1:] - row.cu_seqlens[:-1]).float()
    ids = row.sequence_ids
    if not row.samples:  # filler
        ids, lengths = torch.full_like(ids, -1), torch.zeros_like(lengths)
    return RowRouting(
        sequence_ids=own_positions(ids, share, parallel),
        lengths=lengths,
        scales=scales,
        statistics=statistics,
    )


def own_positions(values: torch.Tensor, share: RowShare, parallel: Parallel) -> torch.Tensor:
    """The values of the positions that this rank's routers see: [T, ...] to [T', ...]."""
    values = share.select(values)
    if not parallel.layout.sequence_parallel:
        return values
    return values.chunk(parallel.tp_size)[parallel.tp_rank]
