"""Where the Hugging Face checkpoints of a run are: the final weights, and those of earlier steps
(`checkpoint.hf_every`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_rl.learner.model.checkpoint_files import checkpoint_name
from megatron_rl.learner.model.checkpoint_sums import SUMS, file_sum
from megatron_rl.weights.huggingface import read_note

FINAL, OF_STEPS = "huggingface", "huggingface_steps"  # folders of a run
_CHECKPOINT = "written_after_checkpoint"  # a note in the final weights


def hf_folder(run_dir: Path, step: int | None) -> Path:
    """`<run_dir>/huggingface_steps/step_<step>`; None: `<run_dir>/huggingface`, of the end."""
    return run_dir / FINAL if step is None else run_dir / OF_STEPS / checkpoint_name(step)


def note_of(checkpoint: Path | None) -> dict[str, str]:
    """What the final weights note of the checkpoint beside which they are written: the SHA-256 of
    the list of its files' sums. Empty without a checkpoint, and for one without sums.
    """
    if checkpoint is None or not (checkpoint / SUMS).is_file():
        return {}
    return {_CHECKPOINT: file_sum(checkpoint / SUMS)}


def is_written(run_dir: Path, checkpoint: Path) -> bool:
    """Whether the final weights were written after this checkpoint. Those of a shorter run that was
    extended, or of an earlier run in the same folder, were not.
    """
    noted = note_of(checkpoint)
    found = read_note(hf_folder(run_dir, None))
    return bool(noted) and found.get(_CHECKPOINT) == noted[_CHECKPOINT]


def forget_later_hf(run_dir: Path, step: int) -> None:
    """Delete the Hugging Face checkpoints of later steps, which a resumed run writes again, and
    parts that a killed process left.
    """
    newest = checkpoint_name(step)
    for folder in (run_dir / OF_STEPS).glob("step_*"):
        if folder.name > newest:
            shutil.rmtree(folder)
    for leftover in (
        *run_dir.glob(f".{FINAL}.partial.*"),
        *run_dir.glob(f"{OF_STEPS}/.*.partial.*"),
    ):
        shutil.rmtree(leftover)
