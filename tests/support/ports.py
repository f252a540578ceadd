"""Ports for what a test starts, below Linux's range of ephemeral ports, which other processes'
connections use.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator

FIRST_PORT, NUM_PORTS = 15000, 15000


def free_ports() -> Iterator[int]:
    """Ports of this host that nobody listens on, each once; from another start in every server."""
    start = os.getpid() * 97 % NUM_PORTS
    for number in itertools.count(start):
        port = FIRST_PORT + number % NUM_PORTS
        if is_free(port):
            yield port


def free_port(count: int = 1) -> int:
    """The first of so many ports in a row that nobody listens on, other ones in every call."""
    chance = random.SystemRandom()
    while True:
        first = FIRST_PORT + chance.randrange(NUM_PORTS - count)
        if all(map(is_free, range(first, first + count))):
            return first


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
