"""A run that is started once more after its last step."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import CheckpointConfig, Config, LoopConfig, ModelConfig
from megatron_rl.errors import NothingToDo
from megatron_rl.learner.model.checkpoint_sums import SUMS, file_sum, sums_text
from megatron_rl.loop.record import save_hf_checkpoint
from megatron_rl.loop.resume import Resumption, check_unfinished
from tests.fakes.learner import FakeLearner


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


def write_sums(checkpoint: Path) -> None:
    sums = {path.name: file_sum(path) for path in checkpoint.iterdir() if path.name != SUMS}
    (checkpoint / SUMS).write_text(sums_text(sums))


def test_weights_that_were_not_written_after_the_last_checkpoint_are_something_to_do(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Whatever the times of the files are: a copy of a run has others."""
    config, planned = make_config(tmp_path, save_hf=True), make_checkpoint(tmp_path)
    config = replace(config, model=ModelConfig(path=str(tiny_checkpoint)))
    assert planned.checkpoint is not None
    write_sums(planned.checkpoint)
    check_unfinished(config, planned)
    save_hf_checkpoint(FakeLearner(), config, step=4)  # not the final weights
    check_unfinished(config, planned)
    written = save_hf_checkpoint(FakeLearner(), config)
    with pytest.raises(NothingToDo):
        check_unfinished(config, planned)
    for path in (written, planned.checkpoint / "run_state.json"):
        os.utime(path, (0, 0))
        with pytest.raises(NothingToDo):
            check_unfinished(config, planned)
    state = planned.checkpoint / "run_state.json"
    state.write_text(json.dumps({"run": {"step": 4, "next_prompt": 8}}))  # of another run
    write_sums(planned.checkpoint)
    check_unfinished(config, planned)


@pytest.mark.parametrize(
    "damage", ["no folder", "an empty folder", "another model", "cut off", "no note", "half a note"]
)
def test_final_weights_that_are_gone_or_replaced_are_written_again(
    damage: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    config, planned = make_config(tmp_path, save_hf=True), make_checkpoint(tmp_path)
    config = replace(config, model=ModelConfig(path=str(tiny_checkpoint)))
    assert planned.checkpoint is not None
    write_sums(planned.checkpoint)
    written = save_hf_checkpoint(FakeLearner(), config)
    with pytest.raises(NothingToDo):
        check_unfinished(config, planned)
    note = tmp_path / ".final_weights"
    if damage == "cut off":
        os.truncate(written / "model.safetensors", 20)
    elif damage == "no note":
        note.unlink()
    elif damage == "half a note":
        os.truncate(note, 40)
    else:
        shutil.rmtree(written)
    if damage == "an empty folder":
        written.mkdir()
    if damage == "another model":
        shutil.copytree(tiny_checkpoint, written)
    check_unfinished(config, planned)


def test_a_checkpoint_without_sums_has_no_final_weights(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    config, planned = make_config(tmp_path, save_hf=True), make_checkpoint(tmp_path)
    config = replace(config, model=ModelConfig(path=str(tiny_checkpoint)))
    save_hf_checkpoint(FakeLearner(), config)
    check_unfinished(config, planned)
