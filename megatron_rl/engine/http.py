"""All HTTP calls to one vLLM server: samples and scores (async), weight updates and readiness
(blocking). Every call sends the run's bearer token, except where readiness is checked without it.

Bodies and answers are those of vLLM 0.32: vllm/entrypoints/scale_out/token_in_token_out for
samples, vllm/entrypoints/rl/online/api_router.py and
vllm/entrypoints/serve/dev/cache/api_router.py for weights. Retries are in `engine/pool.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import httpx

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.engine.answers import generate_body, read_completions, read_scores, score_body
from megatron_rl.engine.requests import Completion, GenerateRequest
from megatron_rl.errors import EngineError, SyncError
from megatron_rl.records import EngineAddress

GENERATE_ROUTE = "/inference/v1/generate"
POISONED = "weights_poisoned"  # error type of engine/gate.py; a retry cannot succeed
MAX_REASON_CHARACTERS = 600  # of an engine's answer, quoted in an error
ABANDON_SECONDS = 5.0  # an error is already being raised and must not be held up


class TransientError(Exception):
    """A request that failed in a way that a retry may cure; says what happened."""


class SamplingClient:
    """Asynchronous client of one engine, for samples and scores; each call is one attempt.

    Create it and use it inside one event loop. At most `rollout.max_in_flight` requests are open
    at a time.

    Raises:
        TransientError: from every call, if the connection broke, the engine answered with a status
            of 500 or above, or a sample was aborted.
        EngineError: from every call, if the engine refused the request, is poisoned, sent an
            invalid answer, or sent none within `rollout.request_timeout_seconds`.
    """

    def __init__(self, address: EngineAddress, config: RolloutConfig) -> None:
        self.url = address.url
        self._timeout_seconds = config.request_timeout_seconds
        self._in_flight = asyncio.Semaphore(config.max_in_flight)
        self._client = httpx.AsyncClient(
            base_url=address.url,
            headers=_bearer(address),
            timeout=config.request_timeout_seconds,
            limits=httpx.Limits(max_connections=config.max_in_flight),
            trust_env=False,  # a proxy from the environment must not see the token
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """[num_samples] completions, in the order of their seeds."""
        answer = await self._ask(generate_body(request), f"prompt {request.key}")
        return read_completions(answer, request, self.url)

    async def score(self, token_ids: Sequence[int], what: str) -> tuple[float, ...]:
        """Log-probs of given tokens, 0.0 for the first; `what` names the sequence in errors."""
        answer = await self._ask(score_body(token_ids), what)
        return read_scores(answer, token_ids, f"engine {self.url}, {what}")

    async def _ask(self, body: dict[str, Any], what: str) -> dict[str, Any]:
        try:
            async with self._in_flight:
                response = await self._client.post(GENERATE_ROUTE, json=body)
        except httpx.TimeoutException as error:
            raise EngineError(
                f"engine {self.url}, {what}: expected an answer within rollout."
                f"request_timeout_seconds={self._timeout_seconds:g}, got {type(error).__name__}"
            ) from error
        except httpx.TransportError as error:
            raise TransientError(repr(error)) from error
        if response.status_code >= 400:
            reason = f"status {_reason(response)}"
            if response.status_code < 500 or POISONED in response.text:
                raise EngineError(f"engine {self.url}, {what}: {reason}")
            raise TransientError(reason)
        answer = response.json()
        reasons = {choice["finish_reason"] for choice in answer["choices"]}
        if not reasons <= {"stop", "length"}:  # aborted samples end at an arbitrary token
            raise TransientError(f"finish reasons {sorted(reasons)}")
        return answer


class EngineControl:
    """Blocking client of one engine's weight routes. Not for several threads at a time.

    Raises:
        SyncError: from every method except `abandon`; names the engine, the phase, and the answer.
    """

    def __init__(self, address: EngineAddress, timeout_seconds: float) -> None:
        self.url = address.url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._client = httpx.Client(
            base_url=self.url,
            headers=_bearer(address),
            timeout=timeout_seconds,
            # uvicorn closes the connection after a failed call; the next call must not reuse it.
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,  # a proxy from the environment must not see weights or token
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def world_size(self) -> int:
        """Workers of the engine, over tensor, pipeline and data parallelism."""
        return int(self._call("connect", "GET", "/get_world_size")["world_size"])

    def initialize(self, values: dict[str, Any]) -> None:
        """Tell the engine's workers where the weights will come from."""
        self._call("connect", "POST", "/init_weight_transfer_engine", {"init_info": values})

    def is_paused(self) -> bool:
        """Whether new requests wait in the engine instead of running."""
        return bool(self._call("pause", "GET", "/is_paused")["is_paused"])

    def pause(self) -> None:
        """Let new requests wait in the engine; returns when those in flight are answered."""
        self._call("pause", "POST", "/pause?mode=wait&clear_cache=true")

    def start(self) -> None:
        """Begin an update."""
        self._call("start", "POST", "/start_weight_update")

    def update(self, phase: str, values: dict[str, Any]) -> None:
        """Send one message of an update; `phase` names it in errors."""
        self._call(phase, "POST", "/update_weights", {"update_info": values})

    def abandon(self, reason: str) -> None:
        """End an update that will not be finished. The engine fails it with `reason`; an engine
        that does not answer is ignored.
        """
        try:
            self._client.post(
                "/update_weights",
                json={"update_info": {"abandon": reason}},
                timeout=min(self._timeout_seconds, ABANDON_SECONDS),
            )
        except httpx.HTTPError:
            return

    def finish(self, version: int) -> None:
        """Complete an update; the engine labels every token from now on with `version`."""
        self._call("finish", "POST", "/finish_weight_update", {"weight_version": str(version)})

    def reset_prefix_cache(self) -> None:
        """Discard the blocks that were computed with the old weights."""
        answer = self._call("reset prefix cache", "POST", "/reset_prefix_cache")
        if answer.get("success") is not True:
            raise SyncError(
                f"engine {self.url}, reset prefix cache: expected success, got {answer}; "
                "blocks computed with the old weights are still held"
            )

    def resume(self) -> None:
        """Run the requests that wait, and new ones."""
        self._call("resume", "POST", "/resume")

    def _call(
        self, phase: str, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise SyncError(
                f"engine {self.url}, {phase}: expected an answer within {self._timeout_seconds} s, "
                f"got none ({type(error).__name__}); change sync.timeout_seconds"
            ) from error
        except httpx.HTTPError as error:
            raise SyncError(
                f"engine {self.url}, {phase}: expected an answer, got {error!r}"
            ) from error
        if response.status_code != httpx.codes.OK:
            raise SyncError(
                f"engine {self.url}, {phase}: expected status 200, got {_reason(response)}"
            )
        return response.json()


class ReadinessProbe:
    """Blocking checks whether a server is up and whom it answers; a context manager. A server that
    cannot be reached counts as one that does not answer.
    """

    def __init__(self, address: EngineAddress, timeout_seconds: float) -> None:
        self._token = _bearer(address)
        self._client = httpx.Client(base_url=address.url, timeout=timeout_seconds, trust_env=False)

    def __enter__(self) -> ReadinessProbe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    def is_up(self) -> bool:
        """Whether the server is ready; asked without the token."""
        return self._answers("/health", {})

    def answers_anybody(self) -> bool:
        """Whether the server answers a request without the token."""
        return self._answers("/version", {})

    def accepts_token(self) -> bool:
        """Whether the server answers a request with the run's token."""
        return self._answers("/version", self._token)

    def _answers(self, path: str, headers: dict[str, str]) -> bool:
        try:
            return self._client.get(path, headers=headers).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


def _bearer(address: EngineAddress) -> dict[str, str]:
    return {"Authorization": f"Bearer {address.token}"}


def _reason(response: httpx.Response) -> str:
    """Status and text of an answer, for an error message."""
    return f"{response.status_code}: {response.text[:MAX_REASON_CHARACTERS]}"
