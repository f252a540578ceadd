"""Finds out which process listens on a port of this host, so that the token is sent to no other."""

from __future__ import annotations

import contextlib

import psutil


def listens(pid: int, port: int) -> bool:
    """Whether the process `pid`, or a descendant of it, listens on the TCP port (IPv4)."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return False
    return any(_listens_itself(each, port) for each in family)


def _listens_itself(process: psutil.Process, port: int) -> bool:
    # The process may have ended; the sockets of another user's process cannot be read.
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in process.net_connections("tcp4")
        )
    return False
