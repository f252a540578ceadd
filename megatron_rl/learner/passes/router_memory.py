"""[imports megatron] What a learner keeps about the routers of a mixture of experts between passes:
the routes of the separate pass, for the update, and the statistics of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rl.config.learner import MoeConfig
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.routing import BalanceScales, RouterStatistics, Routes
from megatron_rl.learner.passes.row_routing import PassRouting
from megatron_rl.records import MicroBatch
from megatron_rl.weights.geometry import Geometry


class RouterMemory:
    """The routing of a learner's passes; of a dense model, none."""

    def __init__(self, geometry: Geometry, parallel: Parallel, moe: MoeConfig) -> None:
        self._geometry = geometry
        self._parallel = parallel
        self._moe = moe
        self._follows_rollouts = moe.routing_replay == "rollout"
        # by the identity of a row that is held until its update; of the layers on this rank
        self._recorded: dict[int, Routes] = {}
        self._statistics = self._no_statistics()

    def _no_statistics(self) -> RouterStatistics | None:
        experts, layers = self._geometry.experts, self._geometry.num_layers
        if experts is None:
            return None
        return RouterStatistics(layers, experts.num_experts, self._parallel.device)

    def of_recomputation(self, rows: Sequence[MicroBatch], *, is_for_update: bool) -> PassRouting:
        """The routing of the separate pass.

        Args:
            is_for_update: whether `of_update` is called for the same rows later.
        """
        recorded: dict[int, Routes] = {}
        if is_for_update and self._moe.routing_replay == "recomputed":
            recorded = {index: {} for index in range(len(rows))}
            self._recorded |= {id(row): recorded[index] for index, row in enumerate(rows)}
        return PassRouting(
            recorded=recorded,
            follows_rollouts=self._follows_rollouts,
        )

    def of_update(self, rows: Sequence[MicroBatch], balance: BalanceScales | None) -> PassRouting:
        """The routing of an update: with the routes of the separate pass, if there was one and they
        are replayed.
        """
        known = ((index, self._recorded.pop(id(row), None)) for index, row in enumerate(rows))
        routes = {index: of_row for index, of_row in known if of_row is not None}
        return PassRouting(
            scales=balance,
            statistics=self._statistics,
            routes=routes,
            follows_rollouts=self._follows_rollouts,
        )

    def take_metrics(self) -> dict[str, float]:
        """The metrics of the updates since the last call, which ends a step: routes of updates that
        were left out are forgotten. A collective over all ranks.
        """
        self._recorded = {}
        if self._statistics is None:
            return {}
        found, self._statistics = self._statistics, self._no_statistics()
        num_chosen = self._geometry.experts.num_chosen
        return _metrics_of(found, self._parallel, num_chosen=num_chosen)


def _metrics_of(
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
