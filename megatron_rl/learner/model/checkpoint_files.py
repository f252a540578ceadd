"""Manages the folder of a run's checkpoints: finds the latest one, and makes a new one the latest.

A checkpoint is written under a hidden name, synced to disk and renamed. Only then is its name
written to the file `latest`, so that after a kill at any moment the previous checkpoint is valid.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError

LATEST = "latest"
STATE = "run_state.json"


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `folder/latest` names, or None if no checkpoint has been completed.

    Raises:
        DataError: `latest` does not name a checkpoint in `folder`.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    if Path(name).name != name or not (folder / name / STATE).is_file():
        raise DataError(f"{pointer}: expected the name of a checkpoint beside it, got {name!r}")
    return folder / name


def saved_run_state(folder: Path) -> dict[str, Any]:
    """The run state that was saved with a checkpoint, before anything else of it is read.

    Raises:
        DataError: the checkpoint does not have one.
    """
    path = folder / STATE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"checkpoint {folder}: expected a whole {STATE}, got: {type(error).__name__}: {error}; "
            "resume from another one (resume=FOLDER), or start anew (resume=never)"
        ) from error


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint, `step_000012`. Sorting by name sorts checkpoints by age."""
    return f"step_{step:06d}"


def start_partial(folder: Path, step: int) -> Path:
    """Create an empty folder for the parts of a step's checkpoint; OSError if this fails."""
    partial = partial_folder(folder, step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def partial_folder(folder: Path, step: int) -> Path:
    """The folder in which the parts of a step's checkpoint are written until it is complete."""
    return folder / f".partial_{checkpoint_name(step)}"


def complete(folder: Path, step: int) -> None:
    """Turn the parts of a step into its checkpoint, and write its name to `latest`."""
    partial, final = partial_folder(folder, step), folder / checkpoint_name(step)
    for path in [*partial.rglob("*"), partial]:
        _sync_entry(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    # Synced before `latest` is written, so that after a power failure `latest` cannot name a
    # checkpoint that was lost.
    _sync_entry(folder)
    _point_latest_at(folder, final.name)


def delete_old(folder: Path, step: int, keep: int) -> None:
    """Keep `keep` checkpoints: the one of `step` and those before it. Checkpoints of later steps
    belong to an abandoned run and are deleted first. Parts that a killed run left are deleted too.
    """
    newest = checkpoint_name(step)
    by_age = sorted(folder.glob("step_*"), key=lambda path: (path.name <= newest, path.name))
    for old in by_age[:-keep]:
        shutil.rmtree(old)
    for leftover in folder.glob(".partial_step_*"):
        shutil.rmtree(leftover)


def _sync_entry(path: Path) -> None:
    """Sync a file's bytes, or a folder's entries, which change when a file in it is renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point_latest_at(folder: Path, name: str) -> None:
    pointer = folder / f".{LATEST}.partial"
    with pointer.open("w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    pointer.rename(folder / LATEST)
    _sync_entry(folder)
