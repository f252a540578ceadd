"""The requests to the rollout engines and their answers, independent of HTTP.

An environment uses a `Sampler`. The code that runs environments uses an `EnginePool`, which
`engine/pool.py` implements over HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from megatron_rl.config.rollout import SamplingConfig
from megatron_rl.records import RolloutHead

T = TypeVar("T")


def num_requested_logprobs(num_logprobs: int) -> int:
    """vLLM's `logprobs` for heads of K tokens; 0, the sampled token only, without heads.

    The route lists at most as many tokens as are requested, and the sampled token first, even if it
    is not one of the likeliest. Of K + 1 tokens, the K likeliest are always listed.
    """
    return num_logprobs + 1 if num_logprobs else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Continuations of one token sequence, sampled in one request.

    Example: `GenerateRequest(token_ids=(1, 23, 14, 22, 32), num_samples=8, seed=1280,
    sampling=SamplingConfig(max_tokens=64), key=17)`.
    """

    token_ids: tuple[int, ...]  # everything before the first sampled token
    num_samples: int
    seed: int  # sample j is drawn with seed + j
    sampling: SamplingConfig
    # Index of the prompt, also used in error messages. Requests with the same key are sent to the
    # same engine, whose prefix cache holds the earlier turns.
    key: int
    num_logprobs: int = 0  # K of the completions' heads; 0: no heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled continuation; all its sequences have the same length, at least 1.

    Example: `Completion(token_ids=(26, 2), logprobs=(-0.21, -0.03), weight_versions=(3, 3),
    finish_reason="stop", ends_with_stop_token=True, engine="http://127.0.0.1:18400")`.
    """

    token_ids: tuple[int, ...]  # sampled tokens only
    logprobs: tuple[float, ...]  # of each token, under the distribution it was sampled from
    weight_versions: tuple[int, ...]  # version of the weights that sampled each token
    finish_reason: str  # "stop": the model ended the text; "length": it reached max_tokens
    # whether the last token only ends the text: the end-of-sequence token, or a stop token
    ends_with_stop_token: bool
    engine: str  # url of the engine that sampled it
    head: RolloutHead | None = None  # of each token; None: none was requested
    # [tokens of the request and of the answer but the last, layers, k] integers: the experts that
    # each token was sent to; None: the engine does not return them
    routes: np.ndarray | None = None


class Sampler(Protocol):
    """The interface from which an environment samples."""

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """[num_samples] completions, in the order of their seeds.

        Raises:
            EnginesLostError: too few engines serve.
            EngineError: an engine refused the request, or two engines failed at it.
        """
        ...


class EnginePool(Protocol):
    """The rollout engines of a run."""

    @property
    def urls(self) -> tuple[str, ...]:
        """The URL of each engine that serves."""
        ...

    def shortage(self) -> str:
        """Why too few engines serve; "" if enough do."""
        ...

    def last_answers(self) -> str:
        """What each engine answered last, in one line."""
        ...

    def run(self, jobs: Sequence[Callable[[Sampler], Awaitable[T]]]) -> list[T]:
        """Run all jobs concurrently and return their results in order; blocks until all are done.

        Raises:
            EnginesLostError: too few engines serve.
            EngineError: an engine refused a request, or two engines failed at one. The first
                exception of a job cancels the others.
        """
        ...

    def session(self) -> AbstractAsyncContextManager[Sampler]:
        """A sampler for requests that begin and end at any time, inside one event loop."""
        ...

    async def watch(self) -> None:
        """Run beside a session; returns never.

        Raises:
            EngineError: the run cannot go on.
        """
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Log-probs of given tokens, over the whole vocabulary at temperature 1.

        Args:
            sequences: token ids, at least two in each sequence; distributed over the engines.

        Returns:
            For each sequence one log-prob per token; 0.0 for the first token, which nothing
            predicts.

        Raises:
            EngineError: see `run`.
        """
        ...
