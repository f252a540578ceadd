"""Which engine runs on which GPUs of which node.

`place_engines` takes `rollout.num_engines`, `rollout.tensor_parallel` and `rollout.placement`:

    share      GPUs of the learner's nodes that have no rank
    colocated  GPUs that ranks use too; engines sleep while the learner works
    auto       share if there are enough such GPUs; otherwise GPUs that ranks use too, without sleep
    nodes      nodes of their own, where `python -m megatron_rl.serve` has started them: none here

Engine i runs on node i modulo the number of nodes. Without GPUs an engine is a process like any
other, and every placement but `nodes` is the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.errors import ConfigError
from megatron_rl.process.node import Node

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlace:
    """Where an engine runs. Example: `EnginePlace(index=3, node=1, gpus=(6, 7))`."""

    index: int  # among all engines that the run starts
    node: int
    gpus: tuple[int, ...]  # of those that the node's ranks see; empty: no GPU

    def __str__(self) -> str:
        if not self.gpus:
            return f"node {self.node}"
        return f"node {self.node}, GPU {'+'.join(map(str, self.gpus))}"


def place_engines(config: RolloutConfig, node: Node, *, num_gpus: int) -> list[EnginePlace]:
    """The engines that this run starts on one node.

    Args:
        num_gpus: that the node's ranks see; 0: engines run on its cores.

    Raises:
        ConfigError: the node has too few GPUs.
    """
    if config.placement == "nodes":
        return []
    indices = range(node.index, config.num_engines, node.count)
    if not num_gpus:
        return [EnginePlace(index=index, node=node.index, gpus=()) for index in indices]
    size = config.tensor_parallel
    needed, free = len(indices) * size, max(0, num_gpus - node.num_ranks)
    first = node.num_ranks
    if config.placement == "colocated" or (config.placement == "auto" and needed > free):
        first, free = 0, num_gpus
    if needed > free:
        what = "" if first == 0 else f" beside the {node.num_ranks} of the ranks"
        raise ConfigError(
            f"rollout.num_engines={config.num_engines}: expected {needed} GPUs on node "
            f"{node.index} for {len(indices)} engines of rollout.tensor_parallel={size}{what}, got "
            f"{free}; start fewer engines, or choose another rollout.placement"
        )
    return [
        EnginePlace(
            index=index,
            node=node.index,
            gpus=tuple(range(first + place * size, first + (place + 1) * size)),
        )
        for place, index in enumerate(indices)
    ]


def visible_devices(gpus: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES of an engine: its GPUs among those that this process sees."""
    own = os.environ.get(VISIBLE_VARIABLE)
    names = own.split(",") if own else None
    return ",".join(str(gpu) if names is None else names[gpu] for gpu in gpus)


def may_share_gpus(placement: str) -> bool:
    """Whether the run may start engines on GPUs that ranks use."""
    return placement in ("auto", "colocated")


def sleeps(placement: str, device: str) -> bool:
    """Whether engines sleep while the learner works; `device` is the learner's, cpu or cuda."""
    return placement == "colocated" and device == "cuda"
