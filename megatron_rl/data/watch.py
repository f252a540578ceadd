"""What reading the data reports while it runs."""

from __future__ import annotations

from typing import Protocol


class Watch(Protocol):
    """Is told how far the reading is, and what the user should know of it."""

    def progress(self, what: str, share: float) -> None:
        """`what` is done to `share`, 0 to 1; called often."""
        ...

    def say(self, line: str) -> None:
        """A line for the user."""
        ...


class Silence:
    """A `Watch` that reports nothing."""

    def progress(self, what: str, share: float) -> None:
        """See `Watch.progress`."""

    def say(self, line: str) -> None:
        """See `Watch.say`."""
