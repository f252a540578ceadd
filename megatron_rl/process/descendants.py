"""The processes that a process has started, directly or through others."""

from __future__ import annotations

from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Ids of the children of a process, of their children, and so on; none if it has ended. A
    subreaper (`lifetime.become_subreaper`) also has those that left its session.
    """
    found, to_visit = [], [pid]
    while to_visit:
        for children in Path(f"/proc/{to_visit.pop()}/task").glob("*/children"):
            try:
                own = [int(each) for each in children.read_text().split()]
            except OSError:  # it has just ended
                continue
            found += own
            to_visit += own
    return found
