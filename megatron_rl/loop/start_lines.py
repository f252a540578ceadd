"""The lines that a run prints before its first step."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_rl.config import Config


def starting_line(config: Config) -> str:
    """What is being started, which takes a while."""
    num_ranks, num_engines = int(os.environ.get("WORLD_SIZE", "1")), config.rollout.num_engines
    learner = f"the learner on {num_ranks} {'ranks' if num_ranks > 1 else 'rank'}"
    if config.replay:
        return f"starting: {learner}"
    if not num_engines:
        return f"starting: {learner}; the engines of rollout.urls are given"
    logs = Path(config.run_dir) / "logs"
    engines = f"{num_engines} {'engines' if num_engines > 1 else 'engine'} (logs in {logs})"
    return f"starting: {engines} and {learner}"
