"""The blocking HTTP calls to one vLLM server (readiness, weight updates). Authorization and the
texts of errors are shared with the asynchronous calls of `engine/http_sampling.py`.

Every call sends the run's bearer token, except the readiness checks that deliberately omit it. The
formats of bodies and answers are those of vLLM 0.32: vllm/entrypoints/rl/online/api_router.py and
vllm/entrypoints/serve/dev/cache/api_router.py.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from functools import cache
from typing import Any

import httpx

from megatron_rl.engine.address import ALIVE_ROUTE, GENERATE_ROUTE, EngineAddress
from megatron_rl.engine.alive import answer_while_alive, reason_of_silence
from megatron_rl.errors import SilentEngineError, SyncError

MAX_REASON_CHARACTERS = 600  # of an engine's answer, quoted in an error
ABANDON_SECONDS = 5.0  # short, because an error is already being raised and must not be delayed


@cache
def tls_context() -> ssl.SSLContext:
    """The TLS context of all clients of this process. Reading the certificates takes longer than a
    request, and httpx would read them for every client, also if the engine speaks plain HTTP.
    """
    return httpx.create_ssl_context(trust_env=False)


def authorization(address: EngineAddress) -> dict[str, str]:
    """The header that carries the run's token."""
    return {"Authorization": f"Bearer {address.token}"}


def client_settings(address: EngineAddress) -> dict[str, Any]:
    """What every client of one engine is made with, blocking or not."""
    return {
        "base_url": address.url,
        "headers": authorization(address),
        "trust_env": False,  # a proxy from the environment must not see weights or token
        "verify": tls_context(),
    }


def reason_of(response: httpx.Response) -> str:
    """Status and text of an answer, in one line, for an error message."""
    text = " ".join(response.text[: 2 * MAX_REASON_CHARACTERS].split())
    return f"{response.status_code}: {text[:MAX_REASON_CHARACTERS]}"


class EngineControl:
    """Blocking client of one engine's weight routes. Not thread-safe.

    Raises:
        SyncError: from every method except `abandon`; the message names the engine, the phase and
            the answer.
    """

    def __init__(self, address: EngineAddress, timeout_seconds: float) -> None:
        self.url = address.url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._settings = client_settings(address)
        self._client = httpx.Client(
            **self._settings,
            timeout=timeout_seconds,
            # uvicorn closes the connection after a failed call; the next call must not reuse it.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def check_alive(self, silence_seconds: float) -> None:
        """Raise SilentEngineError if the engine answers no health check within so long."""
        try:
            self._client.get(ALIVE_ROUTE, timeout=silence_seconds)
        except httpx.HTTPError as error:
            raise SilentEngineError(reason_of_silence(self.url, silence_seconds)) from error

    def world_size(self) -> int:
        """The number of workers of the engine, over tensor, pipeline and data parallelism."""
        return int(self._call("connect", "GET", "/get_world_size")["world_size"])

    def initialize(self, values: dict[str, Any]) -> None:
        """Tell the engine's workers where to read the weights."""
        self._call("connect", "POST", "/init_weight_transfer_engine", {"init_info": values})

    def is_paused(self) -> bool:
        """Whether new requests wait in the engine instead of running."""
        return bool(self._call("pause", "GET", "/is_paused")["is_paused"])

    def pause(
        self, *, mode: str = "wait", drain_seconds: float = 0.0, silence_seconds: float = math.inf
    ) -> None:
        """Make new requests wait in the engine.

        Args:
            mode: wait: returns when those in flight are answered; keep: they are frozen where they
                are, and go on after `resume`.
            drain_seconds: is added to the timeout.
            silence_seconds: how long the engine may answer no health checks meanwhile.

        Raises:
            SilentEngineError: it has answered none for so long.
        """
        self._call(
            "pause",
            "POST",
            f"/pause?mode={mode}&clear_cache={'true' if mode == 'wait' else 'false'}",
            added_seconds=drain_seconds,
            silence_seconds=silence_seconds,
        )

    def start(self) -> None:
        """Begin an update."""
        self._call("start", "POST", "/start_weight_update")

    def update(self, phase: str, values: dict[str, Any]) -> None:
        """Send one message of an update; `phase` names it in errors."""
        self._call(phase, "POST", "/update_weights", {"update_info": values})

    def abandon(self, reason: str) -> None:
        """End an update that will not be finished. The engine marks it as failed with `reason`. If
        the engine does not answer, nothing is raised.
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
        """Complete an update; from now on the engine labels every token with `version`."""
        self._call("finish", "POST", "/finish_weight_update", {"weight_version": str(version)})

    def reset_prefix_cache(self, *, with_running: bool = False) -> None:
        """Discard the cached blocks that were computed with the old weights.

        Args:
            with_running: also those of requests in flight, which compute them again.
        """
        path = f"/reset_prefix_cache{'?reset_running_requests=true' if with_running else ''}"
        answer = self._call("reset prefix cache", "POST", path)
        if answer.get("success") is not True:
            raise SyncError(
                f"engine {self.url}, reset prefix cache: expected success, got {answer}; "
                "blocks computed with the old weights are still held"
            )

    def resume(self) -> None:
        """Run the waiting requests, and accept new ones."""
        self._call("resume", "POST", "/resume")

    def sleep(self) -> None:
        """Free the KV cache, and move the weights to the host's memory."""
        self._call("sleep", "POST", "/sleep?level=1")

    def wake(self) -> None:
        """Take the memory again; the engine serves the weights that it had."""
        self._call("wake up", "POST", "/wake_up")

    def _call(
        self,
        phase: str,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        added_seconds: float = 0.0,
        silence_seconds: float = math.inf,
    ) -> dict[str, Any]:
        timeout = self._timeout_seconds + added_seconds
        request = self._client.build_request(method, path, json=body, timeout=timeout)
        try:
            if math.isinf(silence_seconds):
                response = self._client.send(request)
            else:
                response = asyncio.run(self._answer_while_alive(request, silence_seconds))
        except httpx.TimeoutException as error:
            raise SyncError(
                f"engine {self.url}, {phase}: expected an answer within {timeout} s, "
                f"got none ({type(error).__name__}); change sync.timeout_seconds"
            ) from error
        except httpx.HTTPError as error:
            raise SyncError(
                f"engine {self.url}, {phase}: expected an answer, got {error!r}"
            ) from error
        if response.status_code != httpx.codes.OK:
            raise SyncError(
                f"engine {self.url}, {phase}: expected status 200, got {reason_of(response)}"
            )
        return response.json()

    async def _answer_while_alive(
        self, request: httpx.Request, silence_seconds: float
    ) -> httpx.Response:
        async with httpx.AsyncClient(**self._settings) as client:
            return await answer_while_alive(client, request, silence_seconds=silence_seconds)


class ReadinessProbe:
    """Blocking checks of whether a server is ready and which requests it answers; a context
    manager. A server that cannot be reached counts as one that does not answer.
    """

    def __init__(self, address: EngineAddress, timeout_seconds: float) -> None:
        self._token = authorization(address)
        self._client = httpx.Client(
            base_url=address.url, timeout=timeout_seconds, trust_env=False, verify=tls_context()
        )

    def __enter__(self) -> ReadinessProbe:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._client.close()

    def is_up(self) -> bool:
        """Whether the server is ready; the request is sent without the token."""
        return self._answers("/health", {})

    def answers_anybody(self) -> bool:
        """Whether the server answers a request without the token."""
        return self._answers("/version", {})

    def accepts_token(self) -> bool:
        """Whether the server answers a request with the run's token."""
        return self._answers("/version", self._token)

    def refuses_logprobs(self, num_logprobs: int) -> bool:
        """Whether the server refuses a request because it asks for so many log-probs a token. A
        server that does not answer now, for instance because it is paused, refuses nothing.
        """
        body = {
            "token_ids": [0],
            "sampling_params": {"max_tokens": 1, "logprobs": num_logprobs, "detokenize": False},
        }
        try:
            response = self._client.post(GENERATE_ROUTE, headers=self._token, json=body)
        except httpx.TransportError:
            return False
        return response.status_code == httpx.codes.BAD_REQUEST and "logprobs" in response.text

    def returns_routes(self) -> bool:
        """Whether the server answers with the experts that tokens were sent to."""
        sampling = {"max_tokens": 1, "logprobs": 0, "detokenize": False}
        body = {"token_ids": [0, 0], "sampling_params": sampling}
        try:
            response = self._client.post(GENERATE_ROUTE, headers=self._token, json=body)
            choices = response.json()["choices"]
        except (httpx.TransportError, ValueError, KeyError):
            return False
        return all(choice.get("routed_experts") is not None for choice in choices)

    def _answers(self, path: str, headers: dict[str, str]) -> bool:
        try:
            return self._client.get(path, headers=headers).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False
