"""[door: megatron] Save and load all that a run needs to go on as if it had never stopped.

A checkpoint is a folder `checkpoints/step_000012`: Megatron's distributed checkpoint of model and
optimizer (float32 main weights and moments), which any other TP x PP x DP layout can read;
`run_state.json` (step, lambda, schedule, data cursor); and every rank's random state. It is written
under another name, synced to disk and renamed, and only then does the file `checkpoints/latest`
name it: a kill at any moment leaves the previous checkpoint in force.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.learner.learner import Learner

LATEST = "latest"
STATE = "run_state.json"
# Float32 main weights and two moments, and the model's own weights beside them.
BYTES_PER_PARAMETER = 16


def save_checkpoint(
    folder: Path, learner: Learner, run_state: dict[str, Any], *, step: int, keep: int
) -> Path:
    """Write `folder/step_<step>` and make it the latest; a collective over all ranks.

    Args:
        run_state: plain JSON values; the same on every rank.
        keep: how many checkpoints stay, at least 1; older ones are deleted once this one is whole.
    Raises:
        DataError: the disk is full or not writable; the earlier checkpoints are untouched.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f".partial_step_{step:06d}"
    is_writer = learner.parallel.rank == 0
    try:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _check_space(folder, learner)
        dist.barrier()
        _write_parts(partial, learner, run_state)
        dist.barrier()
        if is_writer:
            _sync_to_disk(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _point_latest_at(folder, final.name)
            _delete_old(folder, keep)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        raise DataError(
            f"checkpoint of step {step} in {folder}: expected to write it whole, got: {error}; "
            "free some disk space or change run_dir; earlier checkpoints are untouched"
        ) from error
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The folder that `latest` names, or None where no checkpoint was ever completed."""
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    if Path(name).name != name or not (folder / name / STATE).is_file():
        raise DataError(f"{pointer}: expected the name of a checkpoint beside it, got {name!r}")
    return folder / name


def load_checkpoint(folder: Path, learner: Learner) -> dict[str, Any]:
    """Load model, optimizer, schedule and random state, whatever layout saved them; returns the run
    state.

    Raises:
        DataError: a missing, truncated or foreign checkpoint.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        run_state = json.loads((folder / STATE).read_text())
        sharded = _sharded_state(learner, is_loading=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded = dist_checkpointing.load(sharded, str(folder))
    except (OSError, json.JSONDecodeError, CheckpointingException, KeyError, RuntimeError) as error:
        raise DataError(
            f"checkpoint {folder}: expected a whole checkpoint of this model, got: {error!r}"
        ) from error
    learner.model.module.load_state_dict(loaded["model"])
    learner.optimizer.load_state_dict(loaded["optimizer"])
    learner.scheduler.load_state_dict(run_state["scheduler"])
    _load_random_state(folder, learner)
    return run_state["run"]


def _sharded_state(learner: Learner, *, is_loading: bool) -> dict[str, Any]:
    model = learner.model.module.sharded_state_dict()
    optimizer = learner.optimizer.sharded_state_dict(
        model,
        is_loading=is_loading,
        metadata={"distrib_optim_sharding_type": "fully_reshardable"},
    )
    return {"model": model, "optimizer": optimizer}


def _write_parts(folder: Path, learner: Learner, run_state: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    _results_stay_in_process()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dist_checkpointing.save(_sharded_state(learner, is_loading=False), str(folder))
    save_file(_random_state(), folder / _random_name(learner))
    if learner.parallel.rank == 0:
        state = {
            "world_size": learner.parallel.world_size,
            "scheduler": learner.scheduler.state_dict(),
            "run": run_state,
        }
        (folder / STATE).write_text(json.dumps(state, indent=2))


def _results_stay_in_process() -> None:
    """Megatron keeps the writers' results in a manager process of its own, which would outlive a
    killed rank
    (dist_checkpointing/strategies/filesystem_async.py). A synchronous save needs no more than a
    queue.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _random_name(learner: Learner) -> str:
    return f"random_state_rank_{learner.parallel.rank:05d}.safetensors"


def _random_state() -> dict[str, torch.Tensor]:
    from megatron.core import tensor_parallel

    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {"torch": torch.get_rng_state()} | {
        f"megatron.{name}": state for name, state in tracked.items()
    }


def _load_random_state(folder: Path, learner: Learner) -> None:
    """Nothing random decides a run's course (seeds derive from step and prompt), so another layout
    starts afresh.
    """
    from megatron.core import tensor_parallel

    saved_world_size = json.loads((folder / STATE).read_text())["world_size"]
    if saved_world_size != learner.parallel.world_size:
        return
    state = load_file(folder / _random_name(learner))
    torch.set_rng_state(state.pop("torch"))
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {name.removeprefix("megatron."): value for name, value in state.items()}
    )


def _check_space(folder: Path, learner: Learner) -> None:
    """Fail before writing where the disk surely cannot hold the checkpoint."""
    num_parameters = sum(torch.Size(shape).numel() for _, shape in learner.tensor_shapes())
    needed, free = num_parameters * BYTES_PER_PARAMETER, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{free / 2**20:.0f} MiB free on the disk, {needed / 2**20:.0f} MiB needed")


def _sync_to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
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


def _delete_old(folder: Path, keep: int) -> None:
    if keep < 1:
        raise ConfigError(f"checkpoint.keep: expected at least 1, got {keep}")
    for old in sorted(folder.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    for leftover in folder.glob(".partial_step_*"):  # of a run that was killed while it saved
        shutil.rmtree(leftover)
