"""Health checks beside the requests: finds an engine that is frozen or cannot be reached.

A check is a request of its own that the engine's scheduler answers between two steps (the gate
passes it on as vLLM's /is_paused), so a long response is no reason to fail it. While weights are
updated the gate answers itself: an update has a timeout of its own.
"""

from __future__ import annotations

import asyncio
import time

import httpx

from megatron_rl.engine.address import ALIVE_ROUTE, EngineAddress
from megatron_rl.engine.http import ReadinessProbe, authorization, tls_context
from megatron_rl.engine.roster import Roster

PERIOD_SECONDS = 1.0  # between an answer and the next check
# The first requests of an engine may compile kernels, which holds its scheduler up.
FIRST_FACTOR = 5.0  # times the timeout, until the engine has answered one


async def watch_health(address: EngineAddress, roster: Roster, timeout_seconds: float) -> None:
    """Leave the engine out as soon as it has answered nothing for so long; returns never.

    Args:
        timeout_seconds: `rollout.health_timeout_seconds`; an answer of any status counts. Until the
            engine has answered its first request, FIRST_FACTOR times as long.
    """
    async with httpx.AsyncClient(
        base_url=address.url,
        headers=authorization(address),
        trust_env=False,
        verify=tls_context(),
    ) as client:
        answered = time.monotonic()
        while True:
            is_warm = roster.has_answered(address.url)
            seconds = timeout_seconds * (1.0 if is_warm else FIRST_FACTOR)
            if not roster.is_serving(address.url):
                answered = time.monotonic()  # it may serve again later
            elif await _answers(client, answered + seconds - time.monotonic()):
                answered = time.monotonic()
            elif time.monotonic() - answered >= seconds:
                roster.leave_out(address.url, reason_of_silence(address.url, seconds))
            await asyncio.sleep(min(PERIOD_SECONDS, timeout_seconds / 4))


def is_alive(address: EngineAddress, timeout_seconds: float) -> bool:
    """Whether the engine answers a health check; blocks until then or the timeout."""
    try:
        httpx.get(
            f"{address.url}{ALIVE_ROUTE}",
            headers=authorization(address),
            timeout=timeout_seconds,
            trust_env=False,
            verify=tls_context(),
        )
    except httpx.HTTPError:
        return False
    return True


def is_back(address: EngineAddress, timeout_seconds: float) -> bool:
    """Whether an engine that was left out is ready again; blocks for up to three timeouts."""
    with ReadinessProbe(address, timeout_seconds) as probe:
        return probe.is_up() and probe.accepts_token() and is_alive(address, timeout_seconds)


def reason_of_silence(url: str, timeout_seconds: float) -> str:
    """Why an engine is left out that does not answer health checks."""
    return (
        f"engine {url}: expected an answer to health checks within {timeout_seconds:g} s "
        "(rollout.health_timeout_seconds), got none; it is frozen or cannot be reached"
    )


async def _answers(client: httpx.AsyncClient, seconds: float) -> bool:
    try:
        await client.get(ALIVE_ROUTE, timeout=max(seconds, 0.1))
    except httpx.HTTPError:
        return False
    return True
