"""Calls of several engines at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_rl.engine.http import EngineControl
from megatron_rl.errors import SyncError


def nothing() -> None:
    """What the caller does meanwhile, if it does nothing."""


class EngineCalls:
    """Calls up to `num_engines` engines at the same time, each on a thread of its own."""

    def __init__(self, num_engines: int) -> None:
        self._pool = ThreadPoolExecutor(num_engines, thread_name_prefix="publish")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def on_all(
        self,
        engines: Sequence[EngineControl],
        call: Callable[[EngineControl], object],
        meanwhile: Callable[[], None] = nothing,
    ) -> list:
        """Call the engines, run the caller's part at the same time, and wait for all of them even
        if one fails. Returns the answers in the order of the engines.

        Raises the first engine's error in preference to the caller's, which is often a consequence.
        """
        futures = [self._pool.submit(call, engine) for engine in engines]
        try:
            meanwhile()
        except SyncError:
            _wait_for(futures)
            _results(futures)
            raise
        except BaseException:
            # No engine may be called again before these calls have returned.
            _wait_for(futures)
            raise
        _wait_for(futures)
        return _results(futures)

    def failures(
        self, engines: Sequence[EngineControl], call: Callable[[EngineControl], None]
    ) -> dict[str, str]:
        """Call the engines; by URL, the SyncError of each that failed."""
        futures = {engine.url: self._pool.submit(call, engine) for engine in engines}
        found = {}
        for url, future in futures.items():
            try:
                future.result()
            except SyncError as error:
                found[url] = str(error)
        return found


def _wait_for(futures: Sequence[Future]) -> None:
    for future in futures:
        future.exception()


def _results(futures: Sequence[Future]) -> list:
    return [future.result() for future in futures]
