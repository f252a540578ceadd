"""[imports megatron] What the routers of this rank are told about the rows of a pass, and the
metrics of what they wrote down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_rl.learner.layout.context import RowShare
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.routing import BalanceScales, RouterStatistics, Routes, RowRouting
from megatron_rl.records import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRouting:
    """What the routers of this rank are told in one pass over rows.

    Example of a forward-only pass: `PassRouting(parallel=parallel)`.
    """

    parallel: Parallel
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
            own = own_positions(row.routes, share, self.parallel)
            routes = dict(enumerate(own.unbind(1)))
        return RowRouting(
            sequence_ids=own_positions(ids, share, self.parallel),
            lengths=lengths,
            scales=self.scales,
            statistics=self.statistics,
            routes=routes,
            recorded=self.recorded.get(index),
        )


def own_positions(values: torch.Tensor, share: RowShare, parallel: Parallel) -> torch.Tensor:
    """The values of the positions that this rank's routers see: [T, ...] to [T', ...]."""
    values = share.select(values)
    if not parallel.layout.sequence_parallel:
        return values
    return values.chunk(parallel.tp_size)[parallel.tp_rank]


def router_metrics(
    statistics: RouterStatistics, parallel: Parallel, *, num_chosen: int
) -> dict[str, float]:
    """The metrics of a step's updates, the same on every rank. A collective over all ranks.

    Every layer is on one pipeline rank, and every token is counted by one of the ranks that share
    its row, so sums over all ranks are those of the model.
    """
    found = torch.cat([statistics.loads, statistics.sums], 1).cpu()
    dist.all_reduce(found, group=parallel.host.world)
    loads, sums = found[:, :-6], found[:, -6:]
    num_tokens, num_sequences = sums[0, 0], sums[0, 1]
    if num_tokens == 0:
        return {}
    sent = num_chosen * num_tokens
    shares = loads / loads.sum(1, keepdim=True).clamp(min=1)
    means = {
        "router/entropy/mean": sums[:, 2] / num_tokens,
        "router/margin/mean": sums[:, 3] / num_tokens,
        "router/z_loss/mean": sums[:, 4] / num_tokens,
        "router/load_balancing_loss/mean": sums[:, 5] / num_sequences,
    }
    return {name: values.mean().item() for name, values in means.items()} | {
        "router/load/max": shares.max().item(),
        "router/load/min": shares.min().item(),
        "router/dropped/mean": (1.0 - loads.sum(1) / sent).mean().item(),
    }
