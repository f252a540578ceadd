"""Questions about processes of this host by their id, for tests that start and end them."""

from __future__ import annotations

import psutil

from megatron_rl.process import guard


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs; a zombie does not."""
    try:
        return guard.is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def parent_of(pid: int) -> int:
    """Id of the parent; -1 if there is no such process."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return -1


def children_of(pid: int) -> list[int]:
    """Ids of the direct children; none if there is no such process."""
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def descendants_of(pid: int) -> list[int]:
    """Ids of the children, their children, and so on."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
