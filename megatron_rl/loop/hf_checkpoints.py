"""Where the Hugging Face checkpoints of a run are: the final weights, and those of earlier steps
(`checkpoint.hf_every`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_rl.learner.model.checkpoint_files import checkpoint_name
from megatron_rl.learner.model.checkpoint_sums import SUMS, file_sum

FINAL, OF_STEPS = "huggingface", "huggingface_steps"  # folders of a run
_MARK = ".final_weights"  # a file of a run


def hf_folder(run_dir: Path, step: int | None) -> Path:
    """`<run_dir>/huggingface_steps/step_<step>`; None: `<run_dir>/huggingface`, of the end."""
    return run_dir / FINAL if step is None else run_dir / OF_STEPS / checkpoint_name(step)


def mark_written(run_dir: Path, checkpoint: Path | None) -> None:
    """Note that the final weights are whole and were written after this checkpoint, the last one.
    The note is a file beside their folder, whose bytes depend on the weights alone.
    """
    if checkpoint is not None and (checkpoint / SUMS).is_file():
        (run_dir / _MARK).write_text(json.dumps(_mark_of(run_dir, checkpoint), indent=2) + "\n")


def is_written(run_dir: Path, checkpoint: Path) -> bool:
    """Whether the final weights were written after this checkpoint, and all their files are there.
    Those of a shorter run that was extended, or of an earlier run in the same folder, were not.
    """
    try:
        noted = json.loads((run_dir / _MARK).read_text())
        return bool(noted == _mark_of(run_dir, checkpoint))
    except (OSError, ValueError):
        return False


def _mark_of(run_dir: Path, checkpoint: Path) -> dict[str, Any]:
    """The SHA-256 of the list of the checkpoint's sums; and the sizes of the final weights' files.

    Raises:
        OSError: there are none, or the checkpoint has no sums.
    """
    sizes = {path.name: path.stat().st_size for path in hf_folder(run_dir, None).iterdir()}
    return {"checkpoint": file_sum(checkpoint / SUMS), "sizes": dict(sorted(sizes.items()))}


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
