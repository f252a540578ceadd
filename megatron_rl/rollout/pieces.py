"""Samples a long response by several requests of a bounded number of tokens, or of about a bounded
time, each of which goes on from the tokens of the one before.

An update that waits for the requests in flight then waits for one piece and not for the whole
response: what is cut goes on with the new weights, and its tokens, log-probs and versions are kept.
The engine's prefix cache holds the earlier pieces, except after an update.

A bound of time becomes one of tokens, by the speed at which the replica's latest requests were
answered. So a piece takes longer than the bound if the engine has become slower meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.rollout.heads import joined_heads
from megatron_rl.rollout.seeds import piece_seed

FIRST_TOKENS = 64  # of a request whose speed is not known yet
MIN_TOKENS = 8  # so that a slow engine is not asked for one token at a time
WEIGHT_OF_NEW = 0.2  # of the latest request in the mean of the speed


class Pace:
    """How many tokens a request may sample.

    Args:
        tokens: the bound; 0: there is none.
        seconds: a request should take at most so long; 0: it may take any time.
    """

    def __init__(self, tokens: int, seconds: float = 0.0) -> None:
        self._tokens = tokens
        self._seconds = seconds
        self._per_second = 0.0  # tokens of one sequence, of the latest requests; 0: not known

    def bound(self, max_tokens: int) -> int:
        """The bound of the next request, of which `max_tokens` are wanted."""
        bounds = [max_tokens]
        if self._tokens:
            bounds.append(self._tokens)
        if self._seconds:
            known = int(self._per_second * self._seconds)
            bounds.append(max(MIN_TOKENS, known) if self._per_second else FIRST_TOKENS)
        return min(bounds)

    def note(self, num_tokens: int, seconds: float) -> None:
        """A request sampled so many tokens of its longest sequence in so long."""
        speed = num_tokens / max(seconds, 1e-6)
        before = self._per_second or speed
        self._per_second = (1 - WEIGHT_OF_NEW) * before + WEIGHT_OF_NEW * speed


class PieceSampler:
    """A `Sampler` around another one.

    Args:
        pace: of all requests of a replica.
        clock: seconds.
    """

    def __init__(
        self, sampler: Sampler, pace: Pace, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sampler = sampler
        self._pace = pace
        self._clock = clock

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """See `Sampler.generate`. The samples are those of one request of a bounded number of
        tokens, which go on one by one.
        """
        first = await self._piece(request, request.sampling.max_tokens)
        rest = [
            self._finish(request, completion, request.seed + sample)
            for sample, completion in enumerate(first)
        ]
        return tuple(await asyncio.gather(*rest))

    async def _piece(self, request: GenerateRequest, max_tokens: int) -> tuple[Completion, ...]:
        started = self._clock()
        bounded = _bounded(request, self._pace.bound(max_tokens))
        completions = await self._sampler.generate(bounded)
        longest = max(len(each.token_ids) for each in completions)
        self._pace.note(longest, self._clock() - started)
        return completions

    async def _finish(
        self, request: GenerateRequest, completion: Completion, seed: int
    ) -> Completion:
        """The whole sample that begins with `completion`."""
        pieces = [completion]
        num_left = request.sampling.max_tokens - len(completion.token_ids)
        while pieces[-1].finish_reason == "length" and num_left > 0:
            said = [token for piece in pieces for token in piece.token_ids]
            going_on = replace(
                request,
                token_ids=(*request.token_ids, *said),
                num_samples=1,
                seed=piece_seed(seed, len(pieces)),
            )
            [piece] = await self._piece(going_on, num_left)
            pieces.append(piece)
            num_left -= len(piece.token_ids)
        return joined(pieces)


def joined(pieces: Sequence[Completion]) -> Completion:
    """One completion of the tokens of all pieces; its end and its engine are the last one's."""
    if len(pieces) == 1:
        return pieces[0]
    return replace(
        pieces[-1],
        token_ids=sum((piece.token_ids for piece in pieces), ()),
        logprobs=sum((piece.logprobs for piece in pieces), ()),
        weight_versions=sum((piece.weight_versions for piece in pieces), ()),
        head=joined_heads([piece.head for piece in pieces if piece.head is not None]),
    )


def _bounded(request: GenerateRequest, max_tokens: int) -> GenerateRequest:
    return replace(request, sampling=replace(request.sampling, max_tokens=max_tokens))
