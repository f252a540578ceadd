"""The folder of a run's checkpoints: which one is the latest, and how a new one becomes it.

A checkpoint is written under a hidden name, synced to disk and renamed, and only then does the file
`latest` name it: a kill at any moment leaves the previous checkpoint in force.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_rl.errors import DataError

LATEST = "latest"
STATE = "run_state.json"


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `folder/latest` names, or None where none was ever completed.

    Raises:
        DataError: the pointer names something that is not a checkpoint beside it.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    if Path(name).name != name or not (folder / name / STATE).is_file():
        raise DataError(f"{pointer}: expected the name of a checkpoint beside it, got {name!r}")
    return folder / name


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint: `step_000012`, by which checkpoints sort by age."""
    return f"step_{step:06d}"


def start_partial(folder: Path, step: int) -> Path:
    """A new, empty folder for the parts of a step's checkpoint; OSError where it cannot be made."""
    partial = partial_folder(folder, step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def partial_folder(folder: Path, step: int) -> Path:
    """Where the parts of a step's checkpoint are written before it is complete."""
    return folder / f".partial_{checkpoint_name(step)}"


def complete(folder: Path, step: int) -> None:
    """Turn the parts of a step into its checkpoint, and let `latest` name it."""
    partial, final = partial_folder(folder, step), folder / checkpoint_name(step)
    for path in [*partial.rglob("*"), partial]:
        _sync_entry(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    # Before `latest` names it: no power cut may keep the pointer and lose what it points at.
    _sync_entry(folder)
    _point_latest_at(folder, final.name)


def delete_old(folder: Path, step: int, keep: int) -> None:
    """Keep `keep` checkpoints, the one of `step` and those before it; a later one belongs to a run
    that was given up, and goes first. Parts that a killed run left go too.
    """
    newest = checkpoint_name(step)
    by_age = sorted(folder.glob("step_*"), key=lambda path: (path.name <= newest, path.name))
    for old in by_age[:-keep]:
        shutil.rmtree(old)
    for leftover in folder.glob(".partial_step_*"):
        shutil.rmtree(leftover)


def _sync_entry(path: Path) -> None:
    """Sync a file's bytes, or the entries of a folder, which a rename in it changes."""
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
