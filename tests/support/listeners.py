"""Which TCP sockets of this host listen, and whose they are: read from /proc while a run runs."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

LISTENING = "0A"  # the state, in linux/tcp_states.h
POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Listener:
    """Example: Listener(address="0.0.0.0", port=29500, is_local=False, inode=81124)."""

    address: str
    port: int
    is_local: bool  # 127.0.0.0/8 or ::1
    inode: int


def listeners() -> list[Listener]:
    """Of all processes of this host, in IPv4 and IPv6."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                address, port = fields[1].split(":")
                ip = _ip(address)
                found.append(
                    Listener(
                        address=str(ip),
                        port=int(port, 16),
                        is_local=ip.is_loopback,
                        inode=int(fields[9]),
                    )
                )
    return found


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """From words of 32 bits in the host's byte order, each in hexadecimal."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    return ipaddress.ip_address(b"".join(words))


def sockets_of(pids: Iterable[int]) -> set[int]:
    """The inodes of all sockets that these processes have open."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(entry.path)
                    if target.startswith("socket:["):
                        inodes.add(int(target[8:-1]))
    return inodes


def listening_addresses(pid: int) -> set[str]:
    """The addresses on which a process listens now."""
    own = sockets_of([pid])
    return {each.address for each in listeners() if each.inode in own}


class ListenerWatch:
    """A context manager: collects in a thread what the processes of a run listen on, until it
    exits.

    Args:
        pids: the processes of the run, called again and again.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids
        self._others = {each.inode for each in listeners()}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.seen: dict[int, Listener] = {}  # of the run, by inode

    def __enter__(self) -> ListenerWatch:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            new = [
                each
                for each in listeners()
                if each.inode not in self.seen and each.inode not in self._others
            ]
            own = sockets_of(self._pids()) if new else set()
            self.seen |= {each.inode: each for each in new if each.inode in own}
