"""The engines of a run over HTTP: runs jobs that send requests (engine/routing.py), beside checks
of the engines' processes and health (engine/health.py). An engine that died, froze, or answers
nothing valid is left out; its requests go to the others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.health import watch_health
from megatron_rl.engine.http_sampling import SamplingClient
from megatron_rl.engine.requests import Sampler
from megatron_rl.engine.roster import Roster
from megatron_rl.engine.routing import CHECK_SECONDS, RoutedSampler, Router
from megatron_rl.errors import EngineError

TELL_SECONDS = 60.0  # of silence before a line that says what is waited for, and between two
MAX_NAMES = 20  # of requests in such a line

T = TypeVar("T")

logger = logging.getLogger(__name__)


def _no_engine_has_ended() -> Mapping[str, str]:
    return {}


class HttpEnginePool:
    """An `EnginePool` over engines that are ready; keeps no connection open between calls.

    Args:
        addresses: at least one engine.
        config: timeouts, retries and the bound on open requests.
        end_token_ids: every sample ends at each of them, and at those that the engine knows.
        first: the engine that gets the first request, modulo their number; replicas of the learner
            begin with different ones.
        check: raises EngineError to end all calls, for instance because an engine's process has
            died and nobody will start it again. It is called while requests are open.
        find_ended: the engines whose processes have ended, by URL, with the causes; they
            are left out. Called as `check` is.
        roster: which engines serve; None: all of them at first.
        version: of the weights that every engine serves at least.
    """

    def __init__(
        self,
        addresses: Sequence[EngineAddress],
        config: RolloutConfig,
        *,
        end_token_ids: Sequence[int] = (),
        first: int = 0,
        check: Callable[[], None],
        find_ended: Callable[[], Mapping[str, str]] = _no_engine_has_ended,
        roster: Roster | None = None,
        version: Callable[[], int] = lambda: 0,
    ) -> None:
        if not addresses:
            raise EngineError("engine pool: expected at least one engine, got none")
        self._addresses = tuple(addresses)
        self._config = config
        self._end_token_ids = tuple(end_token_ids)
        self._first = first
        self._check_all = check
        self._find_ended = find_ended
        urls = [address.url for address in addresses]
        self._roster = roster or Roster(urls, config.min_engines)
        self._version = version

    @property
    def urls(self) -> tuple[str, ...]:
        """The URL of each engine that serves, in the order of `addresses`."""
        return self._roster.serving

    def shortage(self) -> str:
        """Why too few engines serve; "" if enough do."""
        return self._roster.shortage()

    def last_answers(self) -> str:
        """What each engine answered last, in one line."""
        return self._roster.last_answers()

    def run(self, jobs: Sequence[Callable[[Sampler], Awaitable[T]]]) -> list[T]:
        """Run all jobs concurrently and return their results in order; blocks until all are done.

        Raises:
            EnginesLostError: fewer engines serve than `rollout.min_engines`.
            EngineError: an engine refused a request, or two engines failed at one: with an invalid
                answer, none within `rollout.request_timeout_seconds`, or more than
                `rollout.max_retries` failures. The first exception of a job cancels the others.
        """
        return asyncio.run(self._run(jobs))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Log-probs of given tokens, over the whole vocabulary at temperature 1.

        Args:
            sequences: token ids, at least two in each sequence; sequence i is sent to engine i
                modulo the number of engines that serve.

        Returns:
            For each sequence one log-prob per token; 0.0 for the first token, which nothing
            predicts.

        Raises:
            EngineError: see `run`.
        """
        jobs = [
            partial(_score, key=number, token_ids=tuple(token_ids))
            for number, token_ids in enumerate(sequences)
        ]
        return asyncio.run(self._run(jobs))

    @asynccontextmanager
    async def session(self) -> AsyncIterator[RoutedSampler]:
        """A sampler whose connections stay open until the context ends; inside one event loop."""
        clients = [
            SamplingClient(address, self._config, self._end_token_ids)
            for address in self._addresses
        ]
        router = Router(clients, self._config.max_in_flight, self._first, self._roster)
        try:
            yield RoutedSampler(
                clients,
                router,
                self._roster,
                max_retries=self._config.max_retries,
                check=self._check,
                version=self._version,
            )
        finally:
            for client in clients:
                await client.close()

    async def watch(self) -> None:
        """Leave engines out whose processes have ended or that do not answer health checks; returns
        never.

        Raises:
            EngineError: what `check` raises.
        """
        timeout = self._config.health_timeout_seconds
        healths = [
            asyncio.create_task(watch_health(each, self._roster, timeout))
            for each in self._addresses
        ]
        try:
            while True:
                self._check()
                await asyncio.sleep(CHECK_SECONDS)
        finally:
            for task in healths:
                task.cancel()
            await asyncio.gather(*healths, return_exceptions=True)

    def _check(self) -> None:
        self._check_all()
        for url, reason in self._find_ended().items():
            self._roster.leave_out(url, reason)

    async def _run(self, jobs: Sequence[Callable[[RoutedSampler], Awaitable[T]]]) -> list[T]:
        async with self.session() as sampler:
            tasks = [asyncio.ensure_future(job(sampler)) for job in jobs]
            results = asyncio.gather(*tasks)
            watchers = {
                asyncio.create_task(self.watch()),
                asyncio.create_task(self._watch_number(sampler)),
            }
            try:
                await asyncio.wait({results, *watchers}, return_when=asyncio.FIRST_COMPLETED)
                for watcher in watchers:
                    if watcher.done():
                        watcher.result()  # raises: no watcher ever returns
                return await results
            finally:
                for task in (*tasks, *watchers):
                    task.cancel()
                await asyncio.gather(results, *tasks, *watchers, return_exceptions=True)

    async def _watch_number(self, sampler: RoutedSampler) -> None:
        """Raise EnginesLostError as soon as too few engines serve; say what is waited for if an
        engine is silent.
        """
        begin = told = time.monotonic()
        while True:
            self._roster.check_enough()
            await asyncio.sleep(CHECK_SECONDS)
            now = time.monotonic()
            if now - told >= TELL_SECONDS and self._roster.is_any_silent(TELL_SECONDS):
                told = now
                logger.warning(
                    "waited %.0f s for %s; %s",
                    now - begin,
                    ", ".join(sampler.open_requests[:MAX_NAMES]) or "no request",
                    self._roster.last_answers(),
                )


async def _score(
    sampler: RoutedSampler, *, key: int, token_ids: tuple[int, ...]
) -> tuple[float, ...]:
    return await sampler.score(token_ids, key)
