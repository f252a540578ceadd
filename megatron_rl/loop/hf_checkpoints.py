"""Where the Hugging Face checkpoints of a run are: the final weights, and those of earlier steps
(`checkpoint.hf_every`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_rl.learner.model.checkpoint_files import checkpoint_name

FINAL, OF_STEPS = "huggingface", "huggingface_steps"  # folders of a run


def hf_folder(run_dir: Path, step: int | None) -> Path:
    """`<run_dir>/huggingface_steps/step_<step>`; None: `<run_dir>/huggingface`, of the end."""
    return run_dir / FINAL if step is None else run_dir / OF_STEPS / checkpoint_name(step)


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
