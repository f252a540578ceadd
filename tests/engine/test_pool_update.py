"""The pool against a server whose weights are being updated."""

from __future__ import annotations

import asyncio

import pytest

from megatron_rl.config import RolloutConfig, SamplingConfig
from megatron_rl.engine import routing
from megatron_rl.engine.pool import HttpEnginePool
from megatron_rl.engine.requests import Completion, GenerateRequest
from megatron_rl.errors import EngineError
from tests.fakes.http_server import Answer, FakeServer

UPDATING = (409, {"error": {"type": "weights_updating", "message": "ask again"}})
POISONED = (503, {"error": {"type": "weights_poisoned", "message": "an update was left"}})
CHOICE = {
    "index": 0,
    "token_ids": [7],
    "finish_reason": "stop",
    "logprobs": {"content": [{"token_id": 7, "logprob": -0.5}]},
    "weight_versions": [{"version": "3", "start": 0, "end": 1}],
}


def generate(*answers: Answer) -> tuple[Completion, ...]:
    """One sample, through a session whose requests are never repeated after a failure."""
    server = FakeServer(*answers)
    pool = HttpEnginePool([server.address], RolloutConfig(max_retries=0), check=lambda: None)
    request = GenerateRequest(
        token_ids=(1, 5), num_samples=1, seed=0, sampling=SamplingConfig(max_tokens=4), key=0
    )

    async def ask() -> tuple[Completion, ...]:
        async with pool.session() as sampler:
            return await sampler.generate(request)

    try:
        return asyncio.run(ask())
    finally:
        server.close()


def test_it_is_asked_until_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often: an update that takes too long ends as a poisoned engine."""
    monkeypatch.setattr(routing, "UPDATE_SECONDS", 0.01)
    [completion] = generate(*[UPDATING] * 5, (200, {"choices": [CHOICE]}))
    assert (completion.token_ids, completion.weight_versions) == ((7,), (3,))
    with pytest.raises(EngineError, match="weights_poisoned"):
        generate(UPDATING, POISONED)
