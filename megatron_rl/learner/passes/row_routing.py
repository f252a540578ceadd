"""[imports megatron] What the routers of this rank are told about the rows of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron_rl.learner.layout.context import RowShare
from megatron_rl.learner.model.routing import BalanceScales, RouterStatistics, Routes, RowRouting
from megatron_rl.records import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRouting:
    """What the routers of this rank are told in one pass over rows.

    Example of a forward-only pass: `PassRouting()`.
    """

    scales: BalanceScales | None = None
    statistics: RouterStatistics | None = None
    # by the index of the row; a row without an entry is routed freely, and not recorded
    routes: Mapping[int, Routes] = field(default_factory=dict)
    recorded: Mapping[int, Routes] = field(default_factory=dict)
    follows_rollouts: bool = False  # whether rows with the engine's routes take these

    def of_row(self, index: int, row: MicroBatch, share: RowShare) -> RowRouting:
        """The routing of a row of the pass.

        Args:
            share: the positions of the row that the rank computes.
        """
        lengths = (row.cu_seqlens[1:] - row.cu_seqlens[:-1]).float()
        ids = row.sequence_ids
        if not row.samples:  # filler
            ids, lengths = torch.full_like(ids, -1), torch.zeros_like(lengths)
        routes = self.routes.get(index)
        if self.follows_rollouts and row.routes is not None:
            routes = dict(enumerate(share.select_divided(row.routes).unbind(1)))
        return RowRouting(
            sequence_ids=share.select_divided(ids),
            lengths=lengths,
            scales=self.scales,
            statistics=self.statistics,
            routes=routes,
            recorded=self.recorded.get(index),
        )
