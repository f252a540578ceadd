"""A run that is started once more after its last step."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import CheckpointConfig, Config, LoopConfig
from megatron_rl.errors import NothingToDo
from megatron_rl.loop.hf_checkpoints import hf_folder
from megatron_rl.loop.resume import Resumption, check_unfinished


def make_config(run_dir: Path, *, num_steps: int = 4, save_hf: bool = False) -> Config:
    return Config(
        run_dir=str(run_dir),
        loop=LoopConfig(num_steps=num_steps),
        checkpoint=CheckpointConfig(save_hf=save_hf),
    )


def make_checkpoint(run_dir: Path) -> Resumption:
    folder = run_dir / "checkpoints" / "step_000004"
    folder.mkdir(parents=True)
    (folder / "run_state.json").write_text(json.dumps({"run": {"step": 4}}))
    return Resumption(checkpoint=folder)


def test_all_steps_are_done(tmp_path: Path) -> None:
    config, planned = make_config(tmp_path), make_checkpoint(tmp_path)
    expected = r"^all 4 steps are done; raise loop\.num_steps to go on$"
    with pytest.raises(NothingToDo, match=expected):
        check_unfinished(config, planned)
    check_unfinished(config, Resumption())  # a new run
    check_unfinished(make_config(tmp_path, num_steps=5), planned)
    check_unfinished(config, replace(planned, lines=("going back to step_000004",)))
    check_unfinished(replace(config, resume=str(planned.checkpoint)), planned)


def test_weights_that_were_not_written_after_the_last_step_are_something_to_do(
    tmp_path: Path,
) -> None:
    config, planned = make_config(tmp_path, save_hf=True), make_checkpoint(tmp_path)
    check_unfinished(config, planned)
    written = hf_folder(tmp_path, None)
    written.mkdir()
    saved = (planned.checkpoint / "run_state.json").stat().st_mtime
    os.utime(written, (saved - 1, saved - 1))  # by a shorter run
    check_unfinished(config, planned)
    os.utime(written, (saved + 1, saved + 1))
    with pytest.raises(NothingToDo):
        check_unfinished(config, planned)
