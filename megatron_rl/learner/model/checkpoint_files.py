"""Manages the folder of a run's checkpoints: finds them by age, and makes a new one the latest.

A checkpoint is written under a hidden name, synced to disk and renamed. Only then is its name
written to the file `latest`. After a kill at any moment the previous checkpoint or the new one is
whole, and the other is not taken for one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError

FOLDER = "checkpoints"  # below run_dir
LATEST = "latest"
STATE = "run_state.json"
# Of folders that are not checkpoints: not yet, about to be replaced, and being deleted.
_PARTIAL, _REPLACED, _DELETED = ".partial_", ".replaced_", ".deleted_"


def latest_checkpoint(folder: Path) -> Path | None:
    """The first of `checkpoints_by_age`, or None if no checkpoint has been completed.

    Raises:
        DataError: see `checkpoints_by_age`.
    """
    return next(iter(checkpoints_by_age(folder)), None)


def checkpoints_by_age(folder: Path) -> list[Path]:
    """The checkpoints of the run, the newest first: the one that `folder/latest` names, and those
    of earlier steps. Without a file `latest` that names one, those of all steps.

    Raises:
        DataError: `latest` does not name a checkpoint in `folder`, which has none at all.
    """
    found = {
        path.name.removeprefix(_REPLACED): path
        # A step's own folder comes after the one that it was about to replace.
        for prefix in (_REPLACED, "")
        for path in folder.glob(f"{prefix}step_*")
        if re.fullmatch(r"step_\d+", path.name.removeprefix(prefix)) and path.is_dir()
    }
    name = named_by_latest(folder)
    if name is not None and not found:
        raise DataError(
            f"{folder / LATEST}: expected the name of a checkpoint beside it, got {name!r}"
        )
    return [
        found[each] for each in sorted(found, reverse=True) if name not in found or each <= name
    ]


def named_by_latest(folder: Path) -> str | None:
    """What the file `latest` says, as it is; None if there is no such file."""
    try:
        return (folder / LATEST).read_bytes().decode(errors="backslashreplace").strip()
    except FileNotFoundError:
        return None


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
    return folder / f"{_PARTIAL}{checkpoint_name(step)}"


def complete(folder: Path, step: int) -> None:
    """Turn the parts of a step into its checkpoint, and write its name to `latest`."""
    partial, final = partial_folder(folder, step), folder / checkpoint_name(step)
    for path in [*partial.rglob("*"), partial]:
        _sync_entry(path)
    replaced = folder / f"{_REPLACED}{final.name}"
    if final.exists():
        # Renamed and not deleted: it is the run's only checkpoint until the new one has its name.
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    # Synced before `latest` is written, so that after a power failure `latest` cannot name a
    # checkpoint that was lost.
    _sync_entry(folder)
    _point_latest_at(folder, final.name)
    shutil.rmtree(replaced, ignore_errors=True)


def delete_old(folder: Path, step: int, keep: int) -> None:
    """Keep `keep` checkpoints: the one of `step` and those before it. Checkpoints of later steps
    belong to an abandoned run and are deleted first. Parts that a killed run left are deleted too.
    """
    newest = checkpoint_name(step)
    by_age = sorted(folder.glob("step_*"), key=lambda path: (path.name <= newest, path.name))
    for old in by_age[:-keep]:
        old.rename(folder / f"{_DELETED}{old.name}")  # so that half of it is no checkpoint
    for prefix in (_PARTIAL, _REPLACED, _DELETED):
        for leftover in folder.glob(f"{prefix}step_*"):
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
