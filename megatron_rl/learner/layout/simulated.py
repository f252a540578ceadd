"""[imports megatron] One process in the place of every rank in turn: process groups that exchange
nothing, and a record of what the rank would have exchanged.

`simulated_rank` starts torch's "fake" backend, under which a process is one rank of a world of any
size. `recorded_exchanges` replaces the collectives that publish the weights by functions that write
down who talks to whom about which shape.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config.model import ParallelConfig
from megatron_rl.errors import ConfigError
from megatron_rl.learner.layout.cpu_device import run_on_cpu
from megatron_rl.learner.layout.parallel import (
    Parallel,
    create_groups,
    current_parallel,
    shut_down_parallel,
)

META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One call of a collective, as one of its ranks makes it.

    Example: rank 8 sends to rank 0: `Exchange(kind="pair", ranks=(8, 0), shape=(4096, 1024))`, and
    rank 0 receives it with an equal record.
    """

    kind: str  # pair: from the first rank to the second; gather: of all ranks
    ranks: tuple[int, ...]
    shape: tuple[int, ...]


@contextmanager
def simulated_rank(config: ParallelConfig, *, rank: int, world_size: int) -> Iterator[Parallel]:
    """The position of one rank, with groups that exchange nothing, on the meta device. Ranks of
    context parallelism, which hold the same weights, are simulated as replicas of the model.

    Raises:
        ConfigError: this process is a real rank.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError("a simulation: expected one process without torchrun, got a rank")
    run_on_cpu()
    config = replace(config, context=1)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        create_groups(config, has_gloo_groups=False)
        yield current_parallel(config, META)
    finally:
        shut_down_parallel()


@contextmanager
def recorded_exchanges() -> Iterator[list[Exchange]]:
    """Record `send`, `recv` and `gather` of torch.distributed instead of doing them."""
    found: list[Exchange] = []

    def record(kind: str, ranks: tuple[int, ...], tensor: torch.Tensor) -> None:
        found.append(Exchange(kind=kind, ranks=ranks, shape=tuple(tensor.shape)))

    def send(tensor: torch.Tensor, dst: int) -> None:
        record("pair", (dist.get_rank(), dst), tensor)

    def receive(tensor: torch.Tensor, src: int) -> None:
        record("pair", (src, dist.get_rank()), tensor)

    def gather(
        tensor: torch.Tensor, parts: Any, dst: int, group: dist.ProcessGroup | None = None
    ) -> None:
        record("gather", tuple(dist.get_process_group_ranks(group)), tensor)

    originals = {name: getattr(dist, name) for name in ("send", "recv", "gather")}
    try:
        dist.send, dist.recv, dist.gather = send, receive, gather
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
