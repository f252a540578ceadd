"""Measures the seconds spent in each phase of a step, on the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Phase = Callable[[str], AbstractContextManager[None]]
"""Times a block under the name of a phase: `Stopwatch.time`, or a stand-in for it."""


class Stopwatch:
    """Adds up the seconds spent in each phase until `take` is called.

    CUDA work is asynchronous. The seconds of a phase are measured until the host continues; they
    include the device's work only if the phase ends with an operation that the host waits for.

    Args:
        on_enter: called with the name of a phase whenever it is entered, e.g. to show it.

    Example:
        stopwatch = Stopwatch()
        with stopwatch.time("rollout"):
            groups = sample(prompts)
        stopwatch.take()  # {"rollout": 3.1}
    """

    def __init__(self, on_enter: Callable[[str], None] | None = None) -> None:
        self._on_enter = on_enter
        self._seconds: dict[str, float] = {}
        self.current: str | None = None  # the innermost phase being timed, for error messages

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Time a block, even if it raises. A phase inside another one counts towards both."""
        outer, self.current = self.current, phase
        if self._on_enter is not None:
            self._on_enter(phase)
        start = time.perf_counter()
        try:
            yield
            # Not after an exception: `current` then still names the phase that failed.
            self.current = outer
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, in the order the phases were first entered."""
        seconds, self._seconds = self._seconds, {}
        return seconds
