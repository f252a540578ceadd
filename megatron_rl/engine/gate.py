"""ASGI middleware in front of a vLLM server: requires the run's token, and refuses to answer from
weights that are being updated or may be incomplete.

`--middleware megatron_rl.engine.gate.Gate` passes every request to the server through the gate. The
client gets the server's answer, or a refusal in JSON, `{"error": {"type": ..., "message": ...}}`.
Three routes are the gate's own: a run claims the engine, and gives it back (engine/claims.py), and
checks its health (engine/health.py). The gate does not import vLLM; it knows the routes of vLLM
0.32 by name (vllm/entrypoints/rl/online/api_router.py).

vLLM loads weights in place. Therefore no request may be answered between the start of an update and
its successful finish (409 weights_updating). If an update fails, or is left unfinished for
MEGATRON_RL_UPDATE_TIMEOUT seconds, the engine is *poisoned* (503 weights_poisoned) until a later
update succeeds from start to finish. "Poisoned" describes the server; the model in its worker is
then *incomplete* (sync/receive.py). vLLM alone provides neither refusal: its /pause keeps requests
waiting without an answer, and it accepts a finish after half an update.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_rl.engine.address import ALIVE_ROUTE
from megatron_rl.engine.claims import CLAIM_ROUTE, RELEASE_ROUTE, Claim
from megatron_rl.records import TOKEN_VARIABLE

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

START_ROUTES = ("/start_weight_update", "/start_draft_weight_update")
FINISH_ROUTE = "/finish_weight_update"
SCHEDULER_ROUTE = "/is_paused"  # asks EngineCore (vllm/v1/engine/async_llm.py, `is_paused`)
UPDATE_ROUTES = (*START_ROUTES, "/update_weights", FINISH_ROUTE)
# Routes that may answer while the weights are unusable. All others are refused, so that a
# generation route that a later vLLM adds is refused too.
CONTROL_ROUTES = frozenset(
    {
        "/health",
        "/version",
        "/metrics",
        "/load",
        "/pause",
        "/resume",
        "/is_paused",
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/abort_requests",
        "/inference/v1/abort_requests",
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/weight_info",
        "/weight_checker",
        "/get_world_size",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/collective_rpc",
    }
)


class Gate:
    """The middleware, one per server process. Reads MEGATRON_RL_TOKEN and
    MEGATRON_RL_UPDATE_TIMEOUT (seconds) when it is created.

    Raises:
        RuntimeError: there is no token. A server that anybody on the host could control must not
            start.
    """

    def __init__(self, app: App) -> None:
        # The token is removed from the environment, so that no dump of the environment shows it.
        token = os.environ.pop(TOKEN_VARIABLE, "")
        if not token:
            raise RuntimeError(f"gate: expected the run's token in {TOKEN_VARIABLE}, it is not set")
        self._app = app
        self._token_digest = _digest(token.encode())
        self._weights = WeightState(float(os.environ["MEGATRON_RL_UPDATE_TIMEOUT"]))
        self._claim = Claim()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)  # startup and shutdown of the server
            return
        path = scope["path"]
        if path != "/health" and not self._is_authorized(scope):
            message = "expected the run's token as 'Authorization: Bearer ...'"
            await _refuse(scope, send, 401, "unauthorized", message)
        elif path in (CLAIM_ROUTE, RELEASE_ROUTE):
            await self._claimed(path, scope, receive, send)
        elif path == ALIVE_ROUTE:
            await self._alive(scope, receive, send)
        elif path in UPDATE_ROUTES and scope["type"] == "http":
            await self._update(path, scope, receive, send)
        elif path in CONTROL_ROUTES:
            await self._app(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    def _is_authorized(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(values) != 1:
            return False
        scheme, _, token = values[0].partition(b" ")
        # Digests have equal lengths, so the comparison does not reveal the token's length.
        return scheme.lower() == b"bearer" and hmac.compare_digest(
            _digest(token.strip()), self._token_digest
        )

    async def _claimed(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a run that claims this engine, or gives its claim back."""
        try:
            body = json.loads(await _body_of(receive))
            run, holder = str(body["run"]), str(body["holder"])
        except (ValueError, TypeError, KeyError) as error:
            await _refuse(scope, send, 400, "bad_claim", f"expected run and holder, {error!r}")
            return
        if path == RELEASE_ROUTE:
            self._claim.release(run)
            await _answer(send, 200, {})
            return
        other = self._claim.take(run, holder)
        if other is None:
            await _answer(send, 200, {})
        else:
            error = {"type": "claimed", "message": other[0], "age": other[1]}
            await _answer(send, 409, {"error": error})

    async def _alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a health check: by the scheduler's state, which its loop tells between two steps;
        during an update, in which that loop may be busy for long, at once.
        """
        if self._weights.is_updating():
            await _answer(send, 200, {"is_paused": True})
            return
        inner = {"path": SCHEDULER_ROUTE, "raw_path": SCHEDULER_ROUTE.encode(), "query_string": b""}
        await self._app({**scope, **inner}, receive, send)

    async def _update(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._weights.begin(path)
        if refusal is not None:
            await _refuse(scope, send, 409, "no_update", refusal)
            return
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Called before the caller gets the answer, so that its next request sees the new
                # state.
                self._weights.end(path, status)
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            if status == 0:  # an exception or a cancellation: the weights may be in any state
                self._weights.end(path, 500)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._weights.refusal()
        if refusal is not None:
            await _refuse(scope, send, *refusal)
            return
        is_refused = False

        async def send_if_whole(message: Message) -> None:
            # Checked again, because an update may have started while the answer was computed.
            nonlocal is_refused
            refusal = self._weights.refusal()
            if message["type"] == "http.response.start" and refusal is not None:
                is_refused = True
                await _refuse(scope, send, *refusal)
            elif not is_refused:
                await send(message)

        await self._app(scope, receive, send_if_whole)


class WeightState:
    """The state of the weights (serving, updating or poisoned), derived from the calls of the
    update routes. Times are in monotonic seconds.
    """

    def __init__(self, timeout_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._last_call: float | None = None  # of the update in progress
        self._poison: str | None = None

    def refusal(self) -> tuple[int, str, str] | None:
        """Status, type and message to refuse a request for samples with; None while serving."""
        self._expire()
        if self._last_call is not None:
            return 409, "weights_updating", "weights are being updated; ask again after its finish"
        if self._poison is not None:
            message = f"{self._poison}; the engine serves again after a complete update"
            return 503, "weights_poisoned", message
        return None

    def is_updating(self) -> bool:
        """Whether an update has begun and not ended."""
        self._expire()
        return self._last_call is not None

    def begin(self, path: str) -> str | None:
        """Called when an update route is requested. Returns None to let the request through, or the
        reason for refusing it.
        """
        self._expire()
        if path not in START_ROUTES and self._last_call is None:
            if self._poison is None:
                return f"{path}: expected /start_weight_update before it; the weights are unchanged"
            if path == FINISH_ROUTE:
                return f"{path}: {self._poison}; start again"
            return None  # a sender abandons its update in this way; the engine is poisoned already
        self._last_call = self._clock()
        return None

    def end(self, path: str, status: int) -> None:
        """Called when the request of an update route is answered with `status`."""
        self._expire()
        if status >= 400:
            self._last_call = None
            self._poison = f"{path} failed with status {status}"
        elif self._last_call is None:
            return  # too late: the update has timed out and poisoned the engine
        elif path == FINISH_ROUTE:
            self._last_call = self._poison = None
        else:
            self._last_call = self._clock()

    def _expire(self) -> None:
        if self._last_call is None or self._clock() - self._last_call <= self._timeout_seconds:
            return
        self._last_call = None
        self._poison = f"an update was left unfinished for {self._timeout_seconds:g} s"


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


async def _refuse(scope: Scope, send: Send, status: int, kind: str, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": kind})
        return
    await _answer(send, status, {"error": {"type": kind, "message": message}})


async def _answer(send: Send, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _body_of(receive: Receive) -> bytes:
    """The body of a request; what has come of it if the client has gone."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body", False):
            return body
