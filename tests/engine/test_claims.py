"""Claims of runs on engines, at real gates over HTTP without vLLM."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from megatron_rl.engine import claims as claims_module
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.claims import CLAIM_ROUTE, CLAIM_SECONDS, Claim, Claims
from megatron_rl.engine.gate import Gate
from megatron_rl.errors import EngineError

TOKEN = "a-token-for-this-test"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineAddress]:
    """A gate without an engine behind it."""
    monkeypatch.setenv("MEGATRON_RL_TOKEN", TOKEN)
    monkeypatch.setenv("MEGATRON_RL_UPDATE_TIMEOUT", "60")
    monkeypatch.setattr(claims_module, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(claims_module, "LOOK_SECONDS", 0.25)

    async def app(*_: Any) -> None:
        raise AssertionError("nobody asks for this")

    config = uvicorn.Config(Gate(app), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield EngineAddress(url=f"http://127.0.0.1:{port}", token=TOKEN)
    server.should_exit = True
    thread.join()


def test_a_claim_ends_by_itself_unless_it_is_renewed() -> None:
    now = 100.0
    claim = Claim(clock=lambda: now)
    assert claim.take("a", "run a") is None
    now += CLAIM_SECONDS - 1
    assert claim.take("b", "run b") == ("run a", CLAIM_SECONDS - 1)
    assert claim.take("a", "run a") is None
    now += CLAIM_SECONDS - 1
    assert claim.take("b", "run b") == ("run a", CLAIM_SECONDS - 1)
    now += 1
    assert claim.take("b", "run b") is None
    claim.release("a")  # not its claim any more
    assert claim.take("a", "run a") == ("run b", 0)
    claim.release("b")
    assert claim.take("a", "run a") is None


def test_a_second_run_is_refused_and_told_who_has_it(
    address: EngineAddress, tmp_path: Path
) -> None:
    with Claims([address], tmp_path / "first") as first:
        expected = r"claimed by the run in .*first on .*, process \d+; give each run engines"
        begin = time.monotonic()
        with pytest.raises(EngineError, match=expected):
            Claims([address], tmp_path / "second")
        assert time.monotonic() - begin < 5
        first.check()
        # The same run, started again, before the old process has been noticed to be gone.
        Claims([address], tmp_path / "first").release()
    with Claims([address], tmp_path / "second"):
        pass


def test_a_run_that_is_gone_is_waited_for_and_one_that_slept_is_told(
    address: EngineAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "CLAIM_SECONDS", 0.6)
    first = Claims([address], tmp_path / "first")
    renewed, first._body = first._body, {"run": "", "holder": ""}  # its renewals fail from here
    first._body = {"no": "claim"}
    with Claims([address], tmp_path / "second"):
        first._body = renewed
        for _ in range(100):
            time.sleep(0.05)
            if first._lost:
                break
        with pytest.raises(EngineError, match=r"did not renew it in time, and the run in .*second"):
            first.check()
    first.release()


def test_a_claim_needs_the_token_and_names_its_run(address: EngineAddress, tmp_path: Path) -> None:
    wrong = EngineAddress(url=address.url, token="another")
    with pytest.raises(EngineError, match="expected to claim it, got 401"):
        Claims([wrong], tmp_path)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    response = httpx.post(address.url + CLAIM_ROUTE, json=[1], headers=headers)
    assert response.status_code == 400 and "expected run and holder" in response.text


def test_an_engine_that_does_not_answer(tmp_path: Path) -> None:
    nobody = EngineAddress(url="http://127.0.0.1:9", token=TOKEN)
    with pytest.raises(EngineError, match="expected an answer to the claim"):
        Claims([nobody], tmp_path)
