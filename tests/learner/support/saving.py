"""Writes one checkpoint, for tests that need no writer of a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rl.learner.model import checkpoint_files
from megatron_rl.learner.model.checkpoint_writer import CheckpointWriter
from megatron_rl.learner.model.training_model import TrainingModel


def save_checkpoint(
    folder: Path, trained: TrainingModel, run_state: dict[str, Any], *, step: int, keep: int
) -> Path:
    """Write one checkpoint and return when it is complete; see `CheckpointWriter`."""
    CheckpointWriter(folder, trained, keep=keep, is_asynchronous=False).save(run_state, step=step)
    return folder / checkpoint_files.checkpoint_name(step)
