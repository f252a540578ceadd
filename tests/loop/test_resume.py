"""Which checkpoint a run goes on from, when files of some are wrong; without Megatron."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.learner.model.checkpoint_files import LATEST, STATE
from megatron_rl.learner.model.checkpoint_sums import SUMS, file_sum, sums_text
from megatron_rl.loop import resume
from megatron_rl.loop.resume import Resumption, plan_resumption, verify_resumption
from tests.fakes.learner import FakeParallel

STEPS = (2, 4, 6)
TENSORS = "__0_0.distcp"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of a run with three checkpoints, whose inputs are those of this run."""
    monkeypatch.setattr(resume, "check_same_inputs", lambda *_: None)
    monkeypatch.setattr(resume, "changed_settings", lambda *_: ["a setting"])
    for step in STEPS:
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / STATE).write_text(json.dumps({"run": {"step": step}}))
        (folder / TENSORS).write_bytes(bytes([step]) * 100)
        sums = {name: file_sum(folder / name) for name in (STATE, TENSORS)}
        (folder / SUMS).write_text(sums_text(sums))
    (tmp_path / "checkpoints" / LATEST).write_text("step_000006\n")
    return replace(Config(), run_dir=str(tmp_path))


def chosen(config: Config, **parallel: Any) -> tuple[str, list[str]]:
    """The name of the checkpoint, and the lines without that on the one that is whole."""
    planned = plan_resumption(config, {})
    found = verify_resumption(planned, {}, FakeParallel(**parallel))  # type: ignore[arg-type]
    assert found.checkpoint is not None and found.changes == ("a setting",)
    lines = list(found.lines)
    assert "2 files, 0.0 MB, are as they were written (SHA-256, " in lines.pop()
    return found.checkpoint.name, lines


def damage(config: Config, step: int, name: str) -> None:
    """Flip a bit."""
    path = Path(config.run_dir) / f"checkpoints/step_{step:06d}/{name}"
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def test_the_latest_is_taken(config: Config) -> None:
    assert chosen(config) == ("step_000006", [])
    pointer = Path(config.run_dir) / "checkpoints" / LATEST
    pointer.write_text("step_000004\n")  # of a run that was started over
    assert chosen(config) == ("step_000004", [])


@pytest.mark.parametrize("name", [TENSORS, STATE, SUMS])
def test_the_one_before_is_taken_with_one_line_that_names_the_file(
    config: Config, name: str
) -> None:
    damage(config, 6, name)
    found, lines = chosen(config)
    assert found == "step_000004"
    assert len(lines) == 1
    assert name in lines[0] and lines[0].endswith("; going back to step_000004")
    damage(config, 4, TENSORS)
    found, lines = chosen(config)
    assert found == "step_000002" and len(lines) == 2


def test_another_rank_finds_the_wrong_file(config: Config) -> None:
    """This rank reads every second file."""

    class Parallel(FakeParallel):
        def first_problem(self, problem: str) -> str:
            is_first = not self.log
            self.log.append("first_problem")
            return problem or ("__0_0.distcp is damaged" if is_first else "")

    parallel = Parallel(world_size=2)
    found = verify_resumption(plan_resumption(config, {}), {}, parallel)  # type: ignore[arg-type]
    assert found.checkpoint is not None and found.checkpoint.name == "step_000004"
    assert "step_000006: __0_0.distcp is damaged; going back" in found.lines[0]


@pytest.mark.parametrize("pointer", [None, "", "step_000009\n", "../elsewhere\n", "\0\xff"])
def test_without_a_pointer_the_newest_is_taken(config: Config, pointer: str | None) -> None:
    path = Path(config.run_dir) / "checkpoints" / LATEST
    path.unlink()
    if pointer is not None:
        path.write_text(pointer)
    found, lines = chosen(config)
    assert found == "step_000006"
    assert len(lines) == 1 and lines[0].startswith(f"{path}: expected the name of a checkpoint")


def test_a_step_that_was_being_replaced_is_still_there(config: Config) -> None:
    folder = Path(config.run_dir) / "checkpoints"
    shutil.rmtree(folder / "step_000002")
    shutil.rmtree(folder / "step_000004")
    (folder / "step_000006").rename(folder / ".replaced_step_000006")
    planned = plan_resumption(config, {})
    assert planned.checkpoint == folder / ".replaced_step_000006"


def test_none_is_left(config: Config) -> None:
    for step in STEPS:
        damage(config, step, TENSORS)
    with pytest.raises(DataError, match="start anew") as caught:
        chosen(config)
    assert all(f"step_{step:06d}" in str(caught.value) for step in STEPS)
    assert "\n" not in str(caught.value)


def test_one_that_is_named_must_be_whole(config: Config) -> None:
    named = Path(config.run_dir) / "checkpoints/step_000004"
    assert chosen(replace(config, resume=str(named)))[0] == "step_000004"
    damage(config, 4, TENSORS)
    with pytest.raises(DataError, match=r"step_000004: __0_0\.distcp is damaged"):
        chosen(replace(config, resume=str(named)))
    with pytest.raises(DataError, match="expected auto, never or a checkpoint folder"):
        chosen(replace(config, resume=str(named / "no")))
    (named / "empty").mkdir()
    with pytest.raises(DataError, match=r"^checkpoint .*/empty: run_state.json is missing; exp"):
        chosen(replace(config, resume=str(named / "empty")))


def test_never_and_nothing(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume=never: expected a run_dir without checkpoints"):
        plan_resumption(replace(config, resume="never"), {})
    empty = replace(config, run_dir=str(tmp_path / "empty"))
    assert plan_resumption(empty, {}) == Resumption()
    assert plan_resumption(replace(empty, resume="never"), {}) == Resumption()


def test_a_measured_tolerance_that_outlives_a_change_is_told(config: Config) -> None:
    changed = plan_resumption(config, {})
    assert changed.told(6, 9)[-1] == "changed since then: a setting"
    assert "kept: the tolerance of 0.0079, which was measured" in changed.told(6, 9, 0.0079)[-1]
    same = replace(changed, changes=())
    assert same.told(6, 9, 0.0079) == same.told(6, 9)
