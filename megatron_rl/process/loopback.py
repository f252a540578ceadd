"""Keeps what the processes of one host say to each other on its loopback interface.

torch's TCPStore listens on every interface, whatever host name it is given, unless it gets a socket
that listens already; gloo and NCCL listen on the interface of the host's name.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import MutableMapping

import torch.distributed as dist

HOST = "127.0.0.1"
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
INTERFACE = "lo"
AGENT_STORE_VARIABLE = "TORCHELASTIC_USE_AGENT_STORE"  # "True": the agent serves the ranks' store


def is_one_host() -> bool:
    """Whether all ranks run on this host, according to the variables of their launcher."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    return world_size == os.environ.get("LOCAL_WORLD_SIZE", "1")


def use_loopback(environment: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL listen on the loopback interface, unless the variables name another."""
    for name in INTERFACE_VARIABLES:
        environment.setdefault(name, INTERFACE)


def serve_store(port: int, timeout: datetime.timedelta, host: str = HOST) -> dist.TCPStore:
    """A store that this process serves on one interface, by default the loopback interface.

    Args:
        port: 0 for any free one.
        host: an address of this host.
    """
    listener = socket.create_server((host, port))
    return dist.TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def rank_store(timeout: datetime.timedelta) -> dist.Store | None:
    """The store for the process groups of ranks on one host; None if torch has to find it: several
    hosts, or an agent that serves it.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size == 1:
        return dist.HashStore()
    if not is_one_host() or os.environ.get(AGENT_STORE_VARIABLE) == "True":
        return None
    port = int(os.environ["MASTER_PORT"])
    if rank == 0:
        return serve_store(port, timeout)
    return dist.TCPStore(HOST, port, timeout=timeout, wait_for_workers=False)
