"""Sends each request to an engine that serves, and to another one if that engine fails.

The first request of a key is sent to the engine with the fewest open requests of this pool, and
later ones of the key to the same engine, whose prefix cache holds the earlier turns. As long as no
request is answered, keys go to the engines in turn. Samples do not depend on the engine that
produced them, except through the rounding of logits, which in vLLM depends on the other requests in
the batch. So a request whose engine is lost goes out again, with the same seeds, to another one.

httpx retries only connections that cannot be opened. A request must also be repeated after a broken
connection, a status of 500 or above, or an aborted sample, so the retries are implemented here.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar

from megatron_rl.engine.http_sampling import (
    BadAnswerError,
    InvalidAnswerError,
    SamplingClient,
    TransientError,
    UpdatingError,
)
from megatron_rl.engine.requests import Completion, GenerateRequest
from megatron_rl.engine.roster import Roster
from megatron_rl.errors import EngineError
from megatron_rl.process.guard import DEATH_SECONDS

CHECK_SECONDS = 0.5  # between checks of the engines
UPDATE_SECONDS = 0.2  # between requests to an engine whose weights are being updated
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 8.0

T = TypeVar("T")


def engine_of(engines: Sequence[T], key: int) -> T:
    """The engine that scores the sequence of this number."""
    return engines[key % len(engines)]


class LeftOutError(Exception):
    """The engine of a request was left out while the request was open."""


class Router:
    """Chooses the engine of each request among those that serve, and holds requests back while all
    engines are full.
    """

    def __init__(
        self, clients: Sequence[SamplingClient], max_in_flight: int, first: int, roster: Roster
    ) -> None:
        self._clients = [clients[(first + number) % len(clients)] for number in range(len(clients))]
        self._num_open = [0] * len(clients)
        self._engine_of: dict[int, int] = {}  # by key
        self._places = asyncio.Semaphore(max_in_flight * len(clients))
        self._roster = roster

    @asynccontextmanager
    async def client_of(self, key: int) -> AsyncIterator[SamplingClient]:
        """The client of the engine to which a request with this key is sent; the request counts as
        open until the exit.

        Raises:
            EnginesLostError: too few engines serve.
        """
        async with self._places:
            self._roster.check_enough()
            engine = self._engine_of.get(key)
            if engine is None or not self._roster.is_serving(self._clients[engine].url):
                engine = self._least_loaded()
                self._engine_of[key] = engine
            self._num_open[engine] += 1
            try:
                yield self._clients[engine]
            finally:
                self._num_open[engine] -= 1

    def _least_loaded(self) -> int:
        serving = [
            number
            for number, client in enumerate(self._clients)
            if self._roster.is_serving(client.url)
        ]
        return min(serving, key=self._num_open.__getitem__)


class RoutedSampler:
    """Sends each request to the engine of its key, and repeats it after a transient failure; sends
    it to another engine if that engine is left out.

    Args:
        check: looks for engines that have ended, and raises what ends the run.
        version: of the weights that every engine serves at least.
    """

    def __init__(
        self,
        clients: Sequence[SamplingClient],
        router: Router,
        roster: Roster,
        *,
        max_retries: int,
        check: Callable[[], None],
        version: Callable[[], int],
    ) -> None:
        self._clients = {client.url: client for client in clients}
        self._router = router
        self._roster = roster
        self._max_retries = max_retries
        self._check = check
        self._version = version
        self._open: Counter[str] = Counter()

    @property
    def open_requests(self) -> list[str]:
        """What is waited for: "prompt 12", in order."""
        return list(self._open)

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """See `Sampler.generate`.

        Raises:
            EnginesLostError: too few engines serve.
            EngineError: the request was refused, or two engines failed at it.
        """
        name = f"prompt {request.key}"
        identity = (request.key, request.seed, len(request.token_ids))
        with self._waiting(name):
            while True:
                oldest = self._version()
                async with self._router.client_of(request.key) as client:
                    attempt = partial(_generate, client, request, oldest)
                    with self._blames(identity, client.url) as is_done:
                        completions = await self._with_retries(attempt, client.url, name)
                        is_done.append(True)
                if is_done:
                    return completions

    async def score(self, token_ids: Sequence[int], key: int) -> tuple[float, ...]:
        """Log-probs of the tokens of sequence `key`.

        Raises:
            EnginesLostError, EngineError: see `generate`.
        """
        name = f"sequence {key}"
        with self._waiting(name):
            while True:
                self._roster.check_enough()
                client = self._clients[engine_of(self._roster.serving, key)]
                attempt = partial(client.score, token_ids, name)
                with self._blames((name, hash(tuple(token_ids))), client.url) as is_done:
                    scores = await self._with_retries(attempt, client.url, name)
                    is_done.append(True)
                if is_done:
                    return scores

    @contextmanager
    def _waiting(self, name: str):
        self._open[name] += 1
        try:
            yield
        finally:
            self._open -= Counter([name])

    @contextmanager
    def _blames(self, request: Hashable, url: str):
        """Leaves an engine out that fails at a request, and takes the error; raises EngineError if
        it was not the first one that did. Yields a list that is empty after an error.
        """
        is_done: list[bool] = []
        try:
            yield is_done
        except LeftOutError:
            pass
        except BadAnswerError as error:
            is_invalid = isinstance(error, InvalidAnswerError)
            if both := self._roster.blame(request, url, str(error), is_invalid=is_invalid):
                raise EngineError(both) from error
            # Only now: the report of an engine's end, with its log, is preferred to its silence.
            self._check()

    async def _with_retries(self, attempt: Callable[[], Awaitable[T]], url: str, name: str) -> T:
        what, failure = f"engine {url}, {name}", ""
        for number in range(self._max_retries + 1):
            if number:
                pause = FIRST_BACKOFF_SECONDS * 2 ** (number - 1)
                await self._unless_left_out(asyncio.sleep(min(pause, MAX_BACKOFF_SECONDS)), url)
                self._check()
            try:
                answer = await self._unless_left_out(_after_update(attempt), url)
            except TransientError as error:
                failure = str(error)
            else:
                self._roster.note_answer(url, name)
                return answer
        # The guard's report is preferred, because it quotes the engine's log.
        await self._unless_left_out(asyncio.sleep(DEATH_SECONDS), url)
        self._check()
        if not self._roster.is_serving(url):
            raise LeftOutError
        raise BadAnswerError(
            f"{what}: failed {self._max_retries + 1} times "
            f"(rollout.max_retries={self._max_retries}), the last time with {failure}"
        )

    async def _unless_left_out(self, work: Awaitable[T], url: str) -> T:
        """The result of the work; LeftOutError as soon as the engine is left out."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=CHECK_SECONDS)
                if not task.done() and not self._roster.is_serving(url):
                    raise LeftOutError
            return task.result()
        finally:
            task.cancel()


async def _generate(
    client: SamplingClient, request: GenerateRequest, oldest: int
) -> tuple[Completion, ...]:
    """Sample once. An engine that was started again without the run's knowledge is at fault: its
    weights are older than those that all engines serve.
    """
    completions = await client.generate(request)
    versions = {version for each in completions for version in each.weight_versions}
    if min(versions) < oldest:
        raise BadAnswerError(
            f"engine {client.url}, prompt {request.key}: expected samples of weight version "
            f"{oldest} or later, got {min(versions)}; was the engine restarted, or published to "
            "by another run?"
        )
    return completions


async def _after_update(attempt: Callable[[], Awaitable[T]]) -> T:
    """Attempt again for as long as the engine's weights are being updated. The engine ends an
    update that takes too long (engine/gate.py), and then refuses with another error.
    """
    while True:
        try:
            return await attempt()
        except UpdatingError:
            await asyncio.sleep(UPDATE_SECONDS)
