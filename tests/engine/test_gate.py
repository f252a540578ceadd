"""The gate in front of an ASGI application that answers what the test tells it to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import httpx
import pytest

from megatron_rl.engine.gate import Gate, WeightState

TOKEN = "correct horse"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
GENERATION = ["/inference/v1/generate", "/v1/completions", "/v1/chat/completions", "/invocations"]


class Application:
    """Answers every path with 200, or with the status set for it; "raise" fails without one."""

    def __init__(self) -> None:
        self.statuses: dict[str, int | str] = {}
        self.seen: list[str] = []
        self.before_answer: Callable[[], Awaitable[None]] | None = None

    async def __call__(self, scope, receive, send) -> None:
        self.seen.append(scope["path"])
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            return
        status = self.statuses.get(scope["path"], 200)
        if status == "raise":
            raise RuntimeError("the engine is gone")
        if self.before_answer is not None and scope["path"] in GENERATION:
            await self.before_answer()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"tokens"})


class Gated:
    """A gated application, called without a network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, timeout_seconds: float = 60.0) -> None:
        monkeypatch.setenv("MEGATRON_RL_TOKEN", TOKEN)
        monkeypatch.setenv("MEGATRON_RL_UPDATE_TIMEOUT", str(timeout_seconds))
        self.app = Application()
        self.gate = Gate(self.app)

    def post(self, path: str, headers: dict[str, str] = AUTHORIZED) -> httpx.Response:
        return asyncio.run(self.post_async(path, headers))

    async def post_async(self, path: str, headers: dict[str, str] = AUTHORIZED) -> httpx.Response:
        transport = httpx.ASGITransport(self.gate, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.post(path, headers=headers)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Gated:
    return Gated(monkeypatch)


def error_type(response: httpx.Response) -> str:
    return response.json()["error"]["type"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer "},
        [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer wrong")],
    ],
)
def test_only_health_answers_without_the_token(gated: Gated, headers) -> None:
    for path in [*GENERATION, "/metrics", "/collective_rpc", "/start_weight_update", "//health"]:
        response = gated.post(path, headers)
        assert (response.status_code, error_type(response)) == (401, "unauthorized")
        assert TOKEN not in response.text
    assert gated.app.seen == []
    assert gated.post("/health", headers).status_code == 200


def test_the_token_opens_and_leaves_the_environment(gated: Gated) -> None:
    assert gated.post("/v1/completions").text == "tokens"
    assert "MEGATRON_RL_TOKEN" not in os.environ


def test_no_gate_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_RL_TOKEN", raising=False)
    with pytest.raises(RuntimeError, match="MEGATRON_RL_TOKEN"):
        Gate(Application())


@pytest.mark.parametrize(
    ("headers", "is_open"), [([], False), ([(b"authorization", f"Bearer {TOKEN}".encode())], True)]
)
def test_websockets_need_the_token_too(gated: Gated, headers, is_open: bool) -> None:
    sent = []

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": headers}
    asyncio.run(gated.gate(scope, None, send))
    assert sent[0]["type"] == ("websocket.accept" if is_open else "websocket.close")


def test_nothing_generates_between_start_and_finish(gated: Gated) -> None:
    for route in ("/start_weight_update", "/update_weights", "/update_weights"):
        assert gated.post(route).status_code == 200
        for path in [*GENERATION, "/v1/a_route_of_a_later_release"]:
            response = gated.post(path)
            assert (response.status_code, error_type(response)) == (409, "weights_updating")
        assert gated.post("/weight_info").status_code == 200
    assert gated.post("/finish_weight_update").status_code == 200
    assert all(gated.post(path).text == "tokens" for path in GENERATION)


@pytest.mark.parametrize(
    "route", ["/start_weight_update", "/update_weights", "/finish_weight_update"]
)
@pytest.mark.parametrize("failure", [400, 500, "raise"])
def test_a_failed_update_poisons_until_a_complete_one(
    gated: Gated, route: str, failure: int | str
) -> None:
    gated.app.statuses[route] = failure
    for path in ("/start_weight_update", "/update_weights", "/finish_weight_update"):
        if gated.post(path).status_code >= 400:
            break
    del gated.app.statuses[route]
    for path in GENERATION:
        response = gated.post(path)
        assert (response.status_code, error_type(response)) == (503, "weights_poisoned")
        assert route in response.text
    assert gated.post("/finish_weight_update").status_code == 409  # no way out without a start
    assert gated.post("/update_weights").status_code == 200  # told that it is given up
    assert gated.post("/v1/completions").status_code == 503
    gated.post("/start_weight_update")
    gated.post("/update_weights")
    assert gated.post("/v1/completions").status_code == 409
    gated.post("/finish_weight_update")
    assert gated.post("/v1/completions").text == "tokens"


def test_an_update_without_a_start_changes_nothing(gated: Gated) -> None:
    for path in ("/update_weights", "/finish_weight_update"):
        response = gated.post(path)
        assert (response.status_code, error_type(response)) == (409, "no_update")
    assert gated.app.seen == []
    assert gated.post("/v1/completions").text == "tokens"


def test_an_answer_that_an_update_overtook_is_refused(gated: Gated) -> None:
    async def start_an_update() -> None:
        await gated.post_async("/start_weight_update")

    gated.app.before_answer = start_an_update
    response = gated.post("/inference/v1/generate")
    assert (response.status_code, error_type(response)) == (409, "weights_updating")
    assert "tokens" not in response.text


def test_an_update_left_unfinished_poisons() -> None:
    now = 100.0
    state = WeightState(5.0, clock=lambda: now)
    for route in ("/start_weight_update", "/update_weights"):
        assert state.begin(route) is None
        state.end(route, 200)
        now += 4.0  # each call has the time anew
    assert state.refusal()[:2] == (409, "weights_updating")
    now += 2.0
    status, kind, message = state.refusal()
    assert (status, kind) == (503, "weights_poisoned")
    assert "unfinished for 5 s" in message
    assert "start again" in state.begin("/finish_weight_update")


def test_a_finish_that_comes_too_late_does_not_heal() -> None:
    now = 0.0
    state = WeightState(5.0, clock=lambda: now)
    state.begin("/start_weight_update")
    state.end("/start_weight_update", 200)
    state.begin("/finish_weight_update")
    now += 6.0
    state.end("/finish_weight_update", 200)
    assert state.refusal()[1] == "weights_poisoned"
