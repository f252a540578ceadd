"""Ends a run after the step that it is in, if it is asked to: by a file `stop` in its folder.

    touch runs/a/stop

The run saves a checkpoint, deletes the file and ends well; started again, it goes on from there.
launch/slurm.sbatch creates the file before the time limit of a job.
"""

from __future__ import annotations

from pathlib import Path

from megatron_rl.learner.layout.parallel import Parallel

STOP = "stop"


def is_asked_to_stop(run_dir: Path, parallel: Parallel) -> bool:
    """Whether the file is there, as rank 0 sees it. A collective over all ranks."""
    return bool(parallel.from_first_rank(parallel.rank == 0 and (run_dir / STOP).exists()))


def forget_request(run_dir: Path, *, is_first: bool) -> None:
    """Delete the file, when a run starts, and once it has done what the file asks.

    Args:
        is_first: whether this is rank 0; the others do nothing.
    """
    if is_first:
        (run_dir / STOP).unlink(missing_ok=True)
