"""A real engine whose processes are stopped: its health checks tell, and it is well afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import pytest

from megatron_rl.config import RolloutConfig, SamplingConfig
from megatron_rl.engine.health import is_alive
from megatron_rl.engine.pool import HttpEnginePool
from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.engine.roster import Roster
from megatron_rl.engine.server import Engine
from megatron_rl.errors import EnginesLostError
from megatron_rl.process.guard import find_engine_core

HEALTH_SECONDS = 3.0


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ask(engine: Engine, *, is_warm: bool = True) -> Completion:
    config = RolloutConfig(health_timeout_seconds=HEALTH_SECONDS)
    roster = Roster([engine.address.url])
    if is_warm:  # otherwise its first request has more time
        roster.note_answer(engine.address.url, "an earlier prompt")
    pool = HttpEnginePool([engine.address], config, check=engine.check, roster=roster)
    request = GenerateRequest(
        token_ids=(1, 20, 14), num_samples=1, seed=7, sampling=SamplingConfig(max_tokens=8), key=3
    )

    async def generate(sampler: Sampler) -> Completion:
        [completion] = await sampler.generate(request)
        return completion

    [completion] = pool.run([partial(generate)])
    return completion


def test_a_frozen_process_of_an_engine_is_found_within_seconds(engine: Engine) -> None:
    before = ask(engine, is_warm=False)
    assert is_alive(engine.address, HEALTH_SECONDS)
    [server] = [
        each
        for each in psutil.Process(engine.pid).children()
        if "vllm.entrypoints" in " ".join(each.cmdline())
    ]
    core = find_engine_core(server.pid)
    assert core is not None
    for process in (server, core):  # the API server alone answers nothing that the core computes
        with stopped(process.pid):
            begin = time.monotonic()
            with pytest.raises(EnginesLostError, match="frozen or cannot be reached"):
                ask(engine)
            assert time.monotonic() - begin < HEALTH_SECONDS + 3.0
        time.sleep(0.5)
        assert is_alive(engine.address, HEALTH_SECONDS)
        after = ask(engine)
        assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
