"""Health checks beside the requests: finds an engine that is frozen or cannot be reached."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing

import httpx

from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.alive import PERIOD_SECONDS, answers, reason_of_silence
from megatron_rl.engine.http import EngineControl, ReadinessProbe, client_settings
from megatron_rl.engine.roster import Roster
from megatron_rl.errors import SilentEngineError

# The first requests of an engine may compile kernels, which holds its scheduler up.
FIRST_FACTOR = 5.0  # times the timeout, until the engine has answered one


async def watch_health(address: EngineAddress, roster: Roster, timeout_seconds: float) -> None:
    """Leave the engine out as soon as it has answered nothing for so long; returns never.

    Args:
        timeout_seconds: see `seconds_of_silence`; an answer of any status counts.
    """
    async with httpx.AsyncClient(**client_settings(address)) as client:
        answered = time.monotonic()
        while True:
            seconds = seconds_of_silence(address.url, roster, timeout_seconds)
            if not roster.is_serving(address.url):
                answered = time.monotonic()  # it may serve again later
            elif await answers(client, answered + seconds - time.monotonic()):
                answered = time.monotonic()
            elif time.monotonic() - answered >= seconds:
                roster.leave_out(address.url, reason_of_silence(address.url, seconds))
            await asyncio.sleep(min(PERIOD_SECONDS, timeout_seconds / 4))


def seconds_of_silence(url: str, roster: Roster, timeout_seconds: float) -> float:
    """How long an engine may answer no checks: `rollout.health_timeout_seconds`, and FIRST_FACTOR
    times as long until it has answered its first request.
    """
    return timeout_seconds * (1.0 if roster.has_answered(url) else FIRST_FACTOR)


def is_alive(address: EngineAddress, timeout_seconds: float) -> bool:
    """Whether the engine answers a health check; blocks until then or the timeout."""
    with closing(EngineControl(address, timeout_seconds)) as engine:
        try:
            engine.check_alive(timeout_seconds)
        except SilentEngineError:
            return False
    return True


def is_back(address: EngineAddress, timeout_seconds: float) -> bool:
    """Whether an engine that was left out is ready again; blocks for up to three timeouts."""
    with ReadinessProbe(address, timeout_seconds) as probe:
        return probe.is_up() and probe.accepts_token() and is_alive(address, timeout_seconds)
