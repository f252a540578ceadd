"""Samples a long response by several requests of a bounded number of tokens, each of which goes on
from the tokens of the one before.

An update that waits for the requests in flight then waits for one piece and not for the whole
response: what is cut goes on with the new weights, and its tokens, log-probs and versions are kept.
The engine's prefix cache holds the earlier pieces, except after an update.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.rollout.heads import joined_heads
from megatron_rl.rollout.seeds import piece_seed


class PieceSampler:
    """A `Sampler` around another one.

    Args:
        tokens_per_request: the bound; at least 1.
    """

    def __init__(self, sampler: Sampler, tokens_per_request: int) -> None:
        self._sampler = sampler
        self._bound = tokens_per_request

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """See `Sampler.generate`. The samples are those of one request of at most
        `tokens_per_request` tokens, which go on one by one.
        """
        if request.sampling.max_tokens <= self._bound:
            return await self._sampler.generate(request)
        first = await self._sampler.generate(_bounded(request, self._bound))
        rest = [
            self._finish(request, completion, request.seed + sample)
            for sample, completion in enumerate(first)
        ]
        return tuple(await asyncio.gather(*rest))

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
            [piece] = await self._sampler.generate(_bounded(going_on, min(self._bound, num_left)))
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
