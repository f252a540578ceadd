"""Which checkpoint is the latest, and what is deleted: files alone, without Megatron."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.errors import DataError
from megatron_rl.learner.model.checkpoint_files import (
    LATEST,
    STATE,
    complete,
    delete_old,
    latest_checkpoint,
    start_partial,
)


def save(folder: Path, step: int, text: str = "") -> None:
    (start_partial(folder, step) / STATE).write_text(text)
    complete(folder, step)


def test_latest_must_name_a_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for name in ("step_000003", "../elsewhere", ""):
        (tmp_path / LATEST).write_text(f"{name}\n")
        with pytest.raises(DataError, match="expected the name of a checkpoint beside it"):
            latest_checkpoint(tmp_path)


def test_a_partial_checkpoint_is_none(tmp_path: Path) -> None:
    save(tmp_path, 1)
    partial = start_partial(tmp_path, 2)
    (partial / STATE).touch()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000001"
    complete(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000002"
    assert not partial.exists()


def test_a_step_that_is_done_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    (start_partial(tmp_path, 1) / "of a killed run").touch()
    save(tmp_path, 1, "first")
    assert [path.name for path in (tmp_path / "step_000001").iterdir()] == [STATE]
    save(tmp_path, 1, "again")
    assert (latest_checkpoint(tmp_path) / STATE).read_text() == "again"


def test_the_newest_ones_stay_and_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    start_partial(tmp_path, 4)
    delete_old(tmp_path, 3, keep=2)  # 9 is of a run that was given up
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "step_000002",
        "step_000003",
    ]
