"""Checks of ports, given engines, and names of hosts."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from megatron_rl.config import Config
from megatron_rl.doctor.findings import Finding, failed, passed

TIMEOUT_SECONDS = 3.0  # for a connection
LOOPBACK = "127.0.0.1"


def check_ports(config: Config) -> Finding:
    """Whether the ports of engines that the run starts are free, and given engines reachable."""
    rollout = config.rollout
    if rollout.urls:
        unreachable = [url for url in rollout.urls if not is_reachable(url)]
        if unreachable:
            return failed(
                "ports",
                f"rollout.urls: expected engines that listen, got no answer from "
                f"{', '.join(unreachable)}; start them (python -m megatron_rl.serve), or correct "
                "the addresses",
            )
        return passed("ports", f"{len(rollout.urls)} given engines listen")
    if not rollout.port:
        return passed("ports", "free ones are taken")
    ports = range(rollout.port, rollout.port + rollout.num_engines)
    taken = [port for port in ports if not is_free(port)]
    if taken:
        return failed(
            "ports",
            f"rollout.port={rollout.port}: expected {rollout.num_engines} free ports, got "
            f"{', '.join(map(str, taken))} in use; set rollout.port=0 for free ones",
        )
    return passed("ports", f"{ports[0]} to {ports[-1]} are free")


def is_free(port: int) -> bool:
    """Whether a server could bind a port of the loopback interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def is_reachable(url: str) -> bool:
    """Whether something listens at the host and port of a URL."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def check_names() -> Finding:
    """Whether the host that the ranks meet at, or this host, has an address."""
    name = os.environ.get("MASTER_ADDR") or socket.gethostname()
    try:
        addresses = sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None)})
    except OSError as error:
        return failed(
            "names",
            f"{name}: expected a name with an address, got {error}; add it to DNS or /etc/hosts, "
            "or set MASTER_ADDR to an address",
        )
    return passed("names", f"{name} is {', '.join(addresses)}")
