"""One real vLLM server behind its gate, for all tests of this folder that publish to one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.config import RolloutConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.server import start_engines
from tests.sync.served import NUM_LAYERS, UPDATE_TIMEOUT
from tests.sync.tiny_checkpoints import write_checkpoint, write_tokenizer


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Versions 0, 1 and 2 of one model; the server starts from 0."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = [
        write_checkpoint(root / str(seed), "untied", seed, num_layers=NUM_LAYERS)
        for seed in range(3)
    ]
    write_tokenizer(folders[0])
    return folders


@pytest.fixture(scope="package")
def address(
    folders: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineAddress]:
    config = RolloutConfig(dtype="float32", max_num_seqs=32, kv_cache_gib=0.25, max_model_len=512)
    (engine,) = start_engines(
        config,
        model_path=str(folders[0]),
        log_dir=tmp_path_factory.mktemp("logs"),
        token="a-token-for-this-test",
        seed=0,
        update_timeout_seconds=UPDATE_TIMEOUT,
    )
    with engine:
        engine.wait_ready()
        yield engine.address
