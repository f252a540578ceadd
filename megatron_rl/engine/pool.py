"""The engines of a run over HTTP: routes requests to engines, repeats failed requests, and reports
an engine that dies while requests are open.

The first request of a key is sent to the engine with the fewest open requests of this pool, and
later ones of the key to the same engine, whose prefix cache holds the earlier turns. As long as no
request is answered, keys go to the engines in turn. Samples do not depend on the engine that
produced them, except through the rounding of logits, which in vLLM depends on the other requests in
the batch.

httpx retries only connections that cannot be opened. A request must also be repeated after a broken
connection, a status of 500 or above, or an aborted sample, so the retries are implemented here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.http_sampling import SamplingClient, TransientError, UpdatingError
from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.errors import EngineError
from megatron_rl.process.guard import DEATH_SECONDS

CHECK_SECONDS = 0.5  # between checks of the engines' processes
UPDATE_SECONDS = 0.2  # between requests to an engine whose weights are being updated
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 8.0

T = TypeVar("T")


def engine_of(engines: Sequence[T], key: int) -> T:
    """The engine that scores the sequence of this number."""
    return engines[key % len(engines)]


class HttpEnginePool:
    """An `EnginePool` over engines that are ready; keeps no connection open between calls.

    Args:
        addresses: at least one engine.
        config: timeouts, retries and the bound on open requests.
        end_token_ids: every sample ends at each of them, and at those that the engine knows.
        first: the engine that gets the first request, modulo their number; replicas of the learner
            begin with different ones.
        check: raises EngineError if an engine's process has died. It is called while requests are
            open, so that a dead engine is reported with the end of its log and not as a timeout.
    """

    def __init__(
        self,
        addresses: Sequence[EngineAddress],
        config: RolloutConfig,
        *,
        end_token_ids: Sequence[int] = (),
        first: int = 0,
        check: Callable[[], None],
    ) -> None:
        if not addresses:
            raise EngineError("engine pool: expected at least one engine, got none")
        self._addresses = tuple(addresses)
        self._config = config
        self._end_token_ids = tuple(end_token_ids)
        self._first = first
        self._check = check

    @property
    def urls(self) -> tuple[str, ...]:
        """The URL of each engine, in the order of `addresses`."""
        return tuple(address.url for address in self._addresses)

    def run(self, jobs: Sequence[Callable[[Sampler], Awaitable[T]]]) -> list[T]:
        """Run all jobs concurrently and return their results in order; blocks until all are done.

        Raises:
            EngineError: an engine died, refused a request or gave an invalid answer; or a request
                failed more than `rollout.max_retries` times, or was not answered within
                `rollout.request_timeout_seconds`. The first exception of a job cancels the others.
        """
        return asyncio.run(self._run(jobs))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Log-probs of given tokens, over the whole vocabulary at temperature 1.

        Args:
            sequences: token ids, at least two in each sequence; sequence i is sent to engine i
                modulo the number of engines.

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
    async def session(self) -> AsyncIterator[_RoutedSampler]:
        """A sampler whose connections stay open until the context ends; inside one event loop."""
        clients = [
            SamplingClient(address, self._config, self._end_token_ids)
            for address in self._addresses
        ]
        router = _Router(clients, self._config.max_in_flight, self._first)
        try:
            yield _RoutedSampler(clients, router, self._config.max_retries, self._check)
        finally:
            for client in clients:
                await client.close()

    async def watch(self) -> None:
        """Raise EngineError as soon as an engine's process has died; returns never."""
        while True:
            self._check()
            await asyncio.sleep(CHECK_SECONDS)

    async def _run(self, jobs: Sequence[Callable[[_RoutedSampler], Awaitable[T]]]) -> list[T]:
        async with self.session() as sampler:
            tasks = [asyncio.ensure_future(job(sampler)) for job in jobs]
            results = asyncio.gather(*tasks)
            watcher = asyncio.create_task(self.watch())
            try:
                await asyncio.wait({results, watcher}, return_when=asyncio.FIRST_COMPLETED)
                if watcher.done():
                    watcher.result()  # raises: the watcher never returns
                return await results
            finally:
                for task in (*tasks, watcher):
                    task.cancel()
                await asyncio.gather(results, *tasks, watcher, return_exceptions=True)


class _Router:
    """Chooses the engine of each request, and holds requests back while all engines are full."""

    def __init__(self, clients: Sequence[SamplingClient], max_in_flight: int, first: int) -> None:
        self._clients = [clients[(first + number) % len(clients)] for number in range(len(clients))]
        self._num_open = [0] * len(clients)
        self._engine_of: dict[int, int] = {}  # by key
        self._places = asyncio.Semaphore(max_in_flight * len(clients))

    @asynccontextmanager
    async def client_of(self, key: int) -> AsyncIterator[SamplingClient]:
        """The client of the engine to which a request with this key is sent; the request counts as
        open until the exit.
        """
        async with self._places:
            if key not in self._engine_of:
                self._engine_of[key] = self._num_open.index(min(self._num_open))
            engine = self._engine_of[key]
            self._num_open[engine] += 1
            try:
                yield self._clients[engine]
            finally:
                self._num_open[engine] -= 1


class _RoutedSampler:
    """Sends each request to the engine of its key, and repeats it after a transient failure."""

    def __init__(
        self,
        clients: Sequence[SamplingClient],
        router: _Router,
        max_retries: int,
        check: Callable[[], None],
    ) -> None:
        self._clients = tuple(clients)
        self._router = router
        self._max_retries = max_retries
        self._check = check

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """See `Sampler.generate`."""
        async with self._router.client_of(request.key) as client:
            what = f"engine {client.url}, prompt {request.key}"
            return await self._with_retries(lambda: client.generate(request), what)

    async def score(self, token_ids: Sequence[int], key: int) -> tuple[float, ...]:
        """Log-probs of the tokens of sequence `key`."""
        client, name = engine_of(self._clients, key), f"sequence {key}"
        attempt = partial(client.score, token_ids, name)
        return await self._with_retries(attempt, f"engine {client.url}, {name}")

    async def _with_retries(self, attempt: Callable[[], Awaitable[T]], what: str) -> T:
        failure = ""
        for number in range(self._max_retries + 1):
            if number:
                pause = FIRST_BACKOFF_SECONDS * 2 ** (number - 1)
                await asyncio.sleep(min(pause, MAX_BACKOFF_SECONDS))
                self._check()
            try:
                return await _after_update(attempt)
            except TransientError as error:
                failure = str(error)
        # The guard's report is preferred, because it quotes the engine's log.
        await asyncio.sleep(DEATH_SECONDS)
        self._check()
        raise EngineError(
            f"{what}: failed {self._max_retries + 1} times "
            f"(rollout.max_retries={self._max_retries}), the last time with {failure}"
        )


async def _after_update(attempt: Callable[[], Awaitable[T]]) -> T:
    """Attempt again for as long as the engine's weights are being updated. The engine ends an
    update that takes too long (engine/gate.py), and then refuses with another error.
    """
    while True:
        try:
            return await attempt()
        except UpdatingError:
            await asyncio.sleep(UPDATE_SECONDS)


async def _score(
    sampler: _RoutedSampler, *, key: int, token_ids: tuple[int, ...]
) -> tuple[float, ...]:
    return await sampler.score(token_ids, key)
