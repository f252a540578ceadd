"""Seconds per station of a step, on the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stations:
    """Adds up the seconds spent in each station until `take` is called.

    CUDA work is asynchronous: a station's seconds are those until the host goes on, and they are
    the device's too as long as every station ends in something that the host waits for.

    Args:
        on_enter: called with a station's name whenever it is entered, for whoever shows it.

    Example:
        stations = Stations()
        with stations.time("rollout"):
            groups = sample(prompts)
        stations.take()  # {"rollout": 3.1}
    """

    def __init__(self, on_enter: Callable[[str], None] | None = None) -> None:
        self._on_enter = on_enter
        self._seconds: dict[str, float] = {}
        self.current: str | None = None  # the innermost station being timed, for error messages

    @contextmanager
    def time(self, station: str) -> Iterator[None]:
        """Times a block, also when it raises; a station inside another counts in both."""
        outer, self.current = self.current, station
        if self._on_enter is not None:
            self._on_enter(station)
        start = time.perf_counter()
        try:
            yield
            # Not on an exception: `current` then still names the station that failed.
            self.current = outer
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[station] = self._seconds.get(station, 0.0) + elapsed

    def take(self) -> dict[str, float]:
        """Seconds by station since the last call, in the order the stations were first entered."""
        seconds, self._seconds = self._seconds, {}
        return seconds
