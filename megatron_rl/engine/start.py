"""The rollout engines of a config, started: for a run of its own, for `serve`, for runs that share
them.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.engine.checkpoint import engine_model
from megatron_rl.engine.server import Engine, start_engines
from megatron_rl.records import TOKEN_VARIABLE

ENGINE_MODEL = "engine_model"  # the checkpoint that quantised engines start from


def start_engines_of(
    config: Config, folder: Path, *, log_dir: Path | None = None, token: str = ""
) -> list[Engine]:
    """`config.rollout.num_engines` engines, without waiting for them.

    Args:
        folder: of the run; what the engines need beside their model goes there.
        log_dir: None: `folder`/logs.
        token: "": that of MEGATRON_RL_TOKEN, or a random one.
    """
    rollout = config.rollout
    return start_engines(
        rollout,
        model_path=engine_model(rollout, config.model.path, folder / ENGINE_MODEL),
        log_dir=log_dir or folder / "logs",
        token=token or os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32),
        seed=config.loop.seed,
        update_timeout_seconds=config.sync.timeout_seconds,
    )
