"""Who listens on a port of this host, read from /proc: a token is sent to nobody else's server."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megatron_rl.process.guard import all_pids

LISTENING = "0A"  # state of a socket in /proc/net/tcp (linux/net/tcp_states.h)


def listens(group: int, port: int) -> bool:
    """True when a process of process group `group` listens on the TCP port (IPv4)."""
    sockets = {f"socket:[{inode}]" for inode in _listening_sockets(port)}
    return any(sockets & _open_files(pid) for pid in all_pids() if _group_of(pid) == group)


def _listening_sockets(port: int) -> set[str]:
    """Inodes of the sockets that listen on the port, at whatever address."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()  # number, local address:port, remote address:port, state, ...
        if fields[3] == LISTENING and int(fields[1].partition(":")[2], 16) == port:
            inodes.add(fields[9])
    return inodes


def _open_files(pid: int) -> set[str]:
    """What the descriptors of a process name; none where it ended meanwhile."""
    found = set()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                found.add(os.readlink(descriptor))
    return found


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1
