"""Starts real gloo ranks for a test: `run_ranks(function, 2, ...)` calls `function(rank, ...)` in
two new processes and raises what one of them raised. No port: the ranks meet at a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

TIMEOUT = timedelta(seconds=60)


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Run `function(rank, *arguments)` on `world_size` ranks of the default process group.

    Args:
        function: module-level, as it is imported anew in every rank.
        arguments: picklable.

    Returns:
        What each rank returned, in order of rank; anything that `torch.save` can write.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the first rank to fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A server that imported torch once forks the ranks: in tenths of a second, not in ten.
        get_context("forkserver").set_forkserver_preload(["torch", "torch.distributed"])
        multiprocessing.start_processes(
            _rank_main,
            args=(world_size, folder, function, arguments),
            nprocs=world_size,
            start_method="forkserver",
        )
        return [
            torch.load(Path(folder) / f"result_{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _rank_main(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"result_{rank}.pt")
        # A rank that leaves early would take its connections away from a slower one.
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
