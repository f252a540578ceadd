"""Measures for how long nothing was going on, with any number of activities at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class IdleClock:
    """Adds up the seconds in which no activity is open. Callable from any thread.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._num_open = 0
        self._taken = self._last_change = clock()
        self._idle = 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """An activity."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def take(self) -> tuple[float, float]:
        """The idle seconds and all seconds since the last call, or since the start."""
        with self._lock:
            now = self._settle()
            idle, elapsed = self._idle, now - self._taken
            self._idle, self._taken = 0.0, now
            return idle, elapsed

    def _change(self, difference: int) -> None:
        with self._lock:
            self._settle()
            self._num_open += difference

    def _settle(self) -> float:
        now = self._clock()
        if not self._num_open:
            self._idle += now - self._last_change
        self._last_change = now
        return now
