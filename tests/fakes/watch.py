"""A watch of `data/` that keeps what it is told."""

from __future__ import annotations


class LoggedWatch:
    """The lines, and the (what, share) of every report of progress."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shares: list[tuple[str, float]] = []

    def progress(self, what: str, share: float) -> None:
        self.shares.append((what, share))

    def say(self, line: str) -> None:
        self.lines.append(line)
