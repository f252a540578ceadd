"""The asynchronous HTTP calls to one vLLM server, for samples and for log-probs of given tokens.

Each call is one attempt. `engine/pool.py` does the retries; `engine/answers.py` builds the request
bodies and checks the answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.engine.address import GENERATE_ROUTE, EngineAddress
from megatron_rl.engine.answers import (
    generate_body,
    read_completions,
    read_scores,
    score_body,
)
from megatron_rl.engine.http import client_settings, reason_of
from megatron_rl.engine.requests import Completion, GenerateRequest
from megatron_rl.errors import EngineError

# Error types of engine/gate.py: a retry cannot succeed, or succeeds after the update.
POISONED, UPDATING = "weights_poisoned", "weights_updating"


class TransientError(Exception):
    """A request failed, but a retry may succeed; the message says what happened."""


class BadAnswerError(EngineError):
    """The engine is at fault and not the request, unless another engine fails at it too: an answer
    that is invalid, or none in time, or a refusal because its weights are incomplete.
    """


class InvalidAnswerError(BadAnswerError):
    """An answer that is none: no JSON of vLLM's, too few samples, or log-probs that are NaN."""


class UpdatingError(Exception):
    """The engine's weights are being updated; it answers after that."""


class SamplingClient:
    """Asynchronous client of one engine, for samples and scores; each call is one attempt.

    It must be created and used inside one event loop. At most `rollout.max_in_flight` requests are
    open at a time.

    Raises:
        TransientError: from every call, if the connection broke, the engine answered with a status
            of 500 or above, or a sample was aborted.
        UpdatingError: from every call, while the engine's weights are being updated.
        BadAnswerError: from every call, if the engine is poisoned, sent an invalid answer, or did
            not answer within `rollout.request_timeout_seconds`.
        EngineError: from every call, if the engine refused the request.
    """

    def __init__(
        self, address: EngineAddress, config: RolloutConfig, end_token_ids: Sequence[int]
    ) -> None:
        self.url = address.url
        self._end_token_ids = end_token_ids
        self._timeout_seconds = config.request_timeout_seconds
        self._in_flight = asyncio.Semaphore(config.max_in_flight)
        self._client = httpx.AsyncClient(
            **client_settings(address),
            timeout=config.request_timeout_seconds,
            limits=httpx.Limits(max_connections=config.max_in_flight),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """[num_samples] completions, in the order of their seeds."""
        body = generate_body(request, self._end_token_ids)
        what = f"prompt {request.key}"
        answer = await self._ask(body, what)
        with _blames_engine(f"engine {self.url}, {what}"):
            return read_completions(answer, request, self.url)

    async def score(self, token_ids: Sequence[int], what: str) -> tuple[float, ...]:
        """Log-probs of given tokens, 0.0 for the first; `what` names the sequence in errors."""
        answer = await self._ask(score_body(token_ids), what)
        where = f"engine {self.url}, {what}"
        with _blames_engine(where):
            return read_scores(answer, token_ids, where)

    async def _ask(self, body: dict[str, Any], what: str) -> dict[str, Any]:
        try:
            async with self._in_flight:
                response = await self._client.post(GENERATE_ROUTE, json=body)
        except httpx.TimeoutException as error:
            raise BadAnswerError(
                f"engine {self.url}, {what}: expected an answer within rollout."
                f"request_timeout_seconds={self._timeout_seconds:g}, got {type(error).__name__}"
            ) from error
        except httpx.TransportError as error:
            raise TransientError(repr(error)) from error
        if response.status_code >= 400:
            reason = f"status {reason_of(response)}"
            if response.status_code == httpx.codes.CONFLICT and UPDATING in response.text:
                raise UpdatingError(reason)
            if POISONED in response.text:
                raise BadAnswerError(f"engine {self.url}, {what}: {reason}")
            if response.status_code < 500:
                raise EngineError(f"engine {self.url}, {what}: {reason}")
            raise TransientError(reason)
        with _blames_engine(f"engine {self.url}, {what}"):
            answer = response.json()
            reasons = {str(choice["finish_reason"]) for choice in answer["choices"]}
        if not reasons <= {"stop", "length"}:  # aborted samples end at an arbitrary token
            raise TransientError(f"finish reasons {sorted(reasons)}")
        return answer


@contextmanager
def _blames_engine(where: str) -> Iterator[None]:
    """What reading an answer raises, as an InvalidAnswerError; `where` begins the message of what
    is no EngineError.
    """
    try:
        yield
    except EngineError as error:
        raise InvalidAnswerError(str(error)) from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InvalidAnswerError(f"{where}: expected an answer of vLLM, got {error!r}") from error
