"""Health checks of one engine, alone or while another call waits for its answer.

A check is a request of its own that the engine's scheduler answers between two steps (the gate
passes it on as vLLM's /is_paused), so a long response is no reason to fail it. While weights are
updated the gate answers itself: an update has a timeout of its own.
"""

from __future__ import annotations

import asyncio
import time

import httpx

from megatron_rl.engine.address import ALIVE_ROUTE
from megatron_rl.errors import SilentEngineError

PERIOD_SECONDS = 1.0  # between an answer and the next check


async def answers(client: httpx.AsyncClient, seconds: float) -> bool:
    """Whether the engine of this client answers a check within so long; any status counts."""
    try:
        await client.get(ALIVE_ROUTE, timeout=max(seconds, 0.1))
    except httpx.HTTPError:
        return False
    return True


async def answer_while_alive(
    client: httpx.AsyncClient, request: httpx.Request, *, silence_seconds: float
) -> httpx.Response:
    """The answer to a request, for which is waited as long as the engine answers checks.

    Raises:
        SilentEngineError: it has answered none for so long. httpx.HTTPError: as without checks.
    """
    sent = asyncio.create_task(client.send(request))
    answered = time.monotonic()
    try:
        while not (await asyncio.wait({sent}, timeout=min(PERIOD_SECONDS, silence_seconds / 4)))[0]:
            if await answers(client, answered + silence_seconds - time.monotonic()):
                answered = time.monotonic()
            elif time.monotonic() - answered >= silence_seconds and not sent.done():
                raise SilentEngineError(reason_of_silence(str(client.base_url), silence_seconds))
        return sent.result()
    finally:
        sent.cancel()


def reason_of_silence(url: str, timeout_seconds: float) -> str:
    """Why an engine is left out that does not answer health checks."""
    return (
        f"engine {url}: expected an answer to health checks within {timeout_seconds:g} s "
        "(rollout.health_timeout_seconds), got none; it is frozen or cannot be reached"
    )
