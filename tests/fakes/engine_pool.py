"""An engine pool without engines: tokens are drawn from a hash of the request."""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import numpy as np

from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.records import RolloutHead

T = TypeVar("T")
FIRST_TOKEN = 3  # below are pad, begin and end, as in tools/make_tiny_model.py


class FakePool:
    """An `EnginePool` and a `Sampler`. The same request always gives the same completions, except
    for their weight version.

    Args:
        urls: one for each engine; they sample the same, and only `Completion.engine` differs.
        weight_version: of every sampled token; a test may change it between calls.
        vocab_size: sampled tokens are FIRST_TOKEN to vocab_size - 1, and `end_token`.
        end_token: ends a completion, after each token with probability `end_probability`.
        failures: exceptions to raise, by key of the request.
    """

    def __init__(
        self,
        urls: Sequence[str] = ("fake://0",),
        *,
        weight_version: int = 0,
        vocab_size: int = 98,
        end_token: int = 2,
        end_probability: float = 0.2,
        failures: dict[int, Exception] | None = None,
    ) -> None:
        self.urls = tuple(urls)
        self.weight_version = weight_version
        self.requests: list[GenerateRequest] = []  # in the order in which they came
        self.scored: list[tuple[int, ...]] = []
        self._vocab_size = vocab_size
        self._end_token = end_token
        self._end_probability = end_probability
        self.failures = failures or {}

    def run(self, jobs: Sequence[Callable[[Sampler], Awaitable[T]]]) -> list[T]:
        """Run all jobs concurrently; their results in order."""

        async def run_all() -> list[T]:
            tasks = [asyncio.ensure_future(job(self)) for job in jobs]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        return asyncio.run(run_all())

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Sampler]:
        """The pool itself."""
        yield self

    def shortage(self) -> str:
        """No engine is lost."""
        return ""

    def last_answers(self) -> str:
        """Of engines that are no engines."""
        return "fake engines"

    async def watch(self) -> None:
        """No engine dies."""
        await asyncio.Event().wait()

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """[num_samples] completions; sample j depends on the tokens and on `seed + j` alone."""
        await asyncio.sleep(0)  # as with a real engine, other jobs go on meanwhile
        self.requests.append(request)
        if request.key in self.failures:
            raise self.failures[request.key]
        return tuple(
            self._completion(request, request.seed + sample)
            for sample in range(request.num_samples)
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """A log-prob per token that depends on the token and its position; 0.0 for the first."""
        self.scored += [tuple(each) for each in sequences]
        return [
            tuple(
                _float32(-0.01 * (token + position) if position else 0.0)
                for position, token in enumerate(each)
            )
            for each in sequences
        ]

    def _completion(self, request: GenerateRequest, seed: int) -> Completion:
        text = repr((request.token_ids, seed)).encode()
        chance = random.Random(hashlib.sha256(text).digest())
        token_ids: list[int] = []
        while len(token_ids) < request.sampling.max_tokens:
            if chance.random() < self._end_probability:
                token_ids.append(self._end_token)
                break
            token_ids.append(chance.randrange(FIRST_TOKEN, self._vocab_size))
        num_tokens = len(token_ids)
        head = None
        if request.num_logprobs:
            shape = (num_tokens, request.num_logprobs)
            head = RolloutHead(
                token_ids=np.tile(np.arange(shape[1], dtype=np.int32) + FIRST_TOKEN, (shape[0], 1)),
                logprobs=np.full(shape, -5.0, dtype=np.float32),
            )
        return Completion(
            token_ids=tuple(token_ids),
            logprobs=tuple(_float32(-3 * chance.random()) for _ in range(num_tokens)),
            weight_versions=(self.weight_version,) * num_tokens,
            finish_reason="stop" if token_ids[-1] == self._end_token else "length",
            ends_with_stop_token=token_ids[-1] == self._end_token,
            engine=self.urls[request.key % len(self.urls)],
            head=head,
        )


def _float32(value: float) -> float:
    """The nearest float32, as an engine's log-probs are."""
    return struct.unpack("f", struct.pack("f", value))[0]
