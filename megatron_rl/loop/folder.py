"""What a run does to its folder before the first step."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.config.file import save_config
from megatron_rl.loop.ahead import AHEAD
from megatron_rl.loop.hf_checkpoints import forget_later_hf
from megatron_rl.loop.stop import forget_request
from megatron_rl.rollout.recording import truncate_after

SYNC_LOG = "sync.jsonl"


def prepare_folder(config: Config, run_dir: Path) -> None:
    """Make the folder, and write the settings into it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    forget_request(run_dir, is_first=True)


def forget_later_steps(run_dir: Path, step: int) -> None:
    """Delete the records that an interrupted process left of steps that are now repeated."""
    truncate_after(run_dir / "rollouts", step)
    for folder in (run_dir / "rollouts" / "eval").glob("**"):  # of the sets, too
        truncate_after(folder, step)
    truncate_after(run_dir / AHEAD, step)
    cut_sync_log(run_dir / SYNC_LOG, step)
    forget_later_hf(run_dir, step)


def cut_sync_log(path: Path, step: int) -> None:
    """Remove the updates of `step` and of later steps, because they are published again, and also a
    last line that a killed process left incomplete.
    """
    if path.is_file():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        path.write_text("".join(line for line in whole if json.loads(line)["version"] < step))
