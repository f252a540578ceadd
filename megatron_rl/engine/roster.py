"""Which engines serve, and what each of them did last, as one rank knows it.

The requests and the health checks of a rank leave engines out; `loop/crew.py` brings the rosters of
all ranks together, and takes an engine in again when it has the present weights. Any thread may
call any method.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence

from megatron_rl.errors import EnginesLostError

MAX_BLAMED = 2  # engines that fail at one request, before the request is at fault


class Roster:
    """The engines of a run by URL.

    Args:
        urls: of all engines; all of them serve at first.
        min_engines: with fewer, `check_enough` raises.
    """

    def __init__(
        self,
        urls: Sequence[str],
        min_engines: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.urls = tuple(urls)
        self._min_engines = min_engines
        self._clock = clock
        self._lock = threading.Lock()
        self._lost: dict[str, str] = {}
        self._num_starts = dict.fromkeys(self.urls, 0)  # how often an engine was taken in again
        self._last: dict[str, tuple[float, str]] = {}
        self._invalid: set[str] = set()
        self._blamed: dict[Hashable, dict[tuple[str, int], str]] = {}

    @property
    def serving(self) -> tuple[str, ...]:
        """The URLs of the engines that serve, in the order of `urls`."""
        with self._lock:
            return tuple(url for url in self.urls if url not in self._lost)

    @property
    def lost(self) -> dict[str, str]:
        """The engines that are left out, with the reason."""
        with self._lock:
            return dict(self._lost)

    def has_answered_invalidly(self, url: str) -> bool:
        """Whether this engine has answered with something that is no answer."""
        with self._lock:
            return url in self._invalid

    def is_serving(self, url: str) -> bool:
        """Whether this engine serves."""
        with self._lock:
            return url not in self._lost

    def leave_out(self, url: str, reason: str) -> None:
        """Send this engine no more requests. The first reason stays."""
        with self._lock:
            self._lost.setdefault(url, reason)

    def lose_again(self, url: str, reason: str) -> None:
        """An engine that is left out was started again, and lost before it was taken in."""
        with self._lock:
            self._lost[url] = reason

    def take_in(self, url: str) -> None:
        """This engine has the present weights and serves; ignored if it serves already."""
        with self._lock:
            if self._lost.pop(url, None) is not None:
                self._num_starts[url] += 1
                self._last.pop(url, None)

    def shortage(self) -> str:
        """Why too few engines serve; "" if enough do."""
        with self._lock:
            num_serving = len(self.urls) - len(self._lost)
            reasons = list(self._lost.values())
        if num_serving >= min(self._min_engines, len(self.urls)):
            return ""
        if len(self.urls) == 1:
            return reasons[0]
        told = "; ".join(reasons)
        return (
            f"engines: expected at least rollout.min_engines={self._min_engines} that serve, got "
            f"{num_serving} of {len(self.urls)}: {told}"
        )

    def check_enough(self) -> None:
        """Raise EnginesLostError if too few engines serve."""
        if shortage := self.shortage():
            raise EnginesLostError(shortage)

    def blame(self, request: Hashable, url: str, reason: str, *, is_invalid: bool = False) -> str:
        """Note that an engine failed at a request, and leave the engine out. If the request made
        another engine fail before, or this one before it was started again, the request or the
        weights are at fault: then returns what both said, and "" otherwise.

        Args:
            is_invalid: whether it answered with something that is no answer.
        """
        with self._lock:
            if is_invalid:
                self._invalid.add(url)
            blamed = self._blamed.setdefault(request, {})
            blamed[url, self._num_starts[url]] = reason
            reasons = list(blamed.values())
        self.leave_out(url, reason)
        return "; before that: ".join(reasons[::-1]) if len(reasons) >= MAX_BLAMED else ""

    def note_answer(self, url: str, what: str) -> None:
        """Note that an engine has answered; `what` names the request."""
        with self._lock:
            self._last[url] = self._clock(), what

    def has_answered(self, url: str) -> bool:
        """Whether the engine has answered a request since it serves."""
        with self._lock:
            return url in self._last

    def is_any_silent(self, seconds: float) -> bool:
        """Whether an engine that serves has answered nothing for so long, or nothing at all."""
        now = self._clock()
        with self._lock:
            serving = [url for url in self.urls if url not in self._lost]
            return any(
                url not in self._last or now - self._last[url][0] >= seconds for url in serving
            )

    def last_answers(self) -> str:
        """What each engine answered last, in one line."""
        now = self._clock()
        with self._lock:
            return "; ".join(self._last_answer(url, now) for url in self.urls)

    def _last_answer(self, url: str, now: float) -> str:
        if url in self._last:
            when, what = self._last[url]
            told = f"answered {what} {now - when:.0f} s ago"
        else:
            told = "has answered nothing yet"
        return f"{url} {told}{', is left out' if url in self._lost else ''}"
