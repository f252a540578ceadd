"""The interface of a tracker. A module of this folder has `start(run)`, which returns a `Tracker`,
and `SERVER_VARIABLES`, the environment variables of which one must be set to track online.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run.

    Example: `TrackedRun(project="megatron_rl", name="dapo", identity="9f3a01cc",
    folder=Path("runs/dapo/trackers/wandb"), is_online=False, is_new=True, settings={...})`.
    """

    project: str
    name: str
    identity: str  # of this run alone; the same when it is resumed
    folder: Path  # for the tracker's files; empty if it is offline
    is_online: bool
    is_new: bool  # the run begins; otherwise it goes on
    settings: dict[str, Any]  # of the run, as nested plain JSON values


class Tracker(Protocol):
    """Takes the metrics of one run; used by one thread of rank 0."""

    hint: str  # the command that shows or sends what was written

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step, which are finite."""
        ...

    def close(self) -> None:
        """Write what is buffered, and end."""
        ...


def first_line(error: Exception) -> str:
    """An error of a tracker as one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
