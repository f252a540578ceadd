"""One vLLM server for the tests that only ask it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.config import RolloutConfig
from megatron_rl.engine.server import Engine, start_engines

MAX_HEAD = 24  # tokens of a head that the engine is started for; vLLM's own limit is lower


@pytest.fixture(scope="session")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    [started] = start_engines(
        RolloutConfig(dtype="float32", kv_cache_gib=0.1, max_num_seqs=64),
        model_path=str(tiny_checkpoint),
        log_dir=tmp_path_factory.mktemp("logs"),
        token=secrets.token_urlsafe(),
        seed=0,
        update_timeout_seconds=60.0,
        num_logprobs=MAX_HEAD,
    )
    with started:
        started.wait_ready()
        yield started
