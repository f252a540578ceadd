"""[door: megatron] Save and load all that a run needs to go on as if it had never stopped.

A checkpoint is a folder `checkpoints/step_000012`: Megatron's distributed checkpoint of model and
optimizer (float32 main weights and moments), which any other TP x PP x DP layout can read;
`run_state.json` (step, lambda, schedule, data cursor, and the size of every file); and every rank's
random state. It is written under another name, synced to disk and renamed, and only then does the
file `checkpoints/latest` name it: a kill at any moment leaves the previous checkpoint in force.

What can be seen without reading the tensors (a missing or cut file, another model) is looked for
on every rank before the ranks read together, so that all of them fail alike and none waits for
another.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_rl.errors import DataError
from megatron_rl.learner.learner import Learner

LATEST = "latest"
STATE = "run_state.json"
# A float32 main weight and two moments; the model's own weights come on top where they are others.
BYTES_PER_PARAMETER = 12


def save_checkpoint(
    folder: Path, learner: Learner, run_state: dict[str, Any], *, step: int, keep: int
) -> Path:
    """Write `folder/step_<step>` and make it the latest; a collective over all ranks.

    Args:
        run_state: plain JSON values; the same on every rank.
        keep: how many checkpoints stay, at least 1; older ones are deleted once this one is whole.
    Raises:
        DataError: the disk is full or not writable, and the earlier checkpoints are untouched; or
            this one is whole and the latest, but an older one cannot be deleted.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f".partial_step_{step:06d}"
    is_writer = learner.parallel.rank == 0

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _check_space(folder, learner)

    def write() -> None:
        _write_parts(partial, learner)

    def finish() -> None:
        _write_state(partial, learner, run_state)
        _sync_to_disk(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        # Before `latest` names it: no power cut may keep the pointer and lose what it points at.
        _sync_entry(folder)
        _point_latest_at(folder, final.name)

    def delete_old() -> None:
        _delete_old(folder, final.name, keep)

    for phase, takes_part in ((prepare, is_writer), (write, True), (finish, is_writer)):
        error = _first_error(phase if takes_part else None, folder)
        if error is not None:
            if is_writer:
                shutil.rmtree(partial, ignore_errors=True)
            raise DataError(
                f"checkpoint of step {step} in {folder}: expected to write it whole, got: {error}; "
                "free some disk space or change run_dir; earlier checkpoints are untouched"
            )
    error = _first_error(delete_old if is_writer else None, folder)
    if error is not None:
        raise DataError(
            f"checkpoint of step {step} in {folder}: it is whole and the latest, but older ones "
            f"beyond checkpoint.keep={keep} could not be deleted, got: {error}; delete them by "
            "hand, resume=auto goes on from it"
        )
    return final


def _first_error(phase: Callable[[], None] | None, folder: Path) -> str | None:
    """Do this rank's part; what went wrong with anybody's, the same on every rank. A collective."""
    error = None
    try:
        if phase is not None:
            phase()
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as caught:
        # torch's writer says "unexpected pos" where the disk is full
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        error = f"{_in_brief(caught)} ({free / 2**20:.1f} MiB free on that disk)"
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((each for each in errors if each is not None), None)


def _in_brief(error: BaseException) -> str:
    """In one line; of torch's collection of all ranks' errors, the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


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

    Learning rate, betas and the other settings of the optimizer are this run's config; the
    checkpoint says how far the run had come.

    Raises:
        DataError: a missing, truncated or foreign checkpoint.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    state = _read_state(folder, learner)
    try:
        sharded = _sharded_state(learner, is_loading=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded = dist_checkpointing.load(sharded, str(folder))
        random_state = _read_random_state(folder, learner, state["world_size"])
    except (
        OSError,
        EOFError,
        KeyError,
        RuntimeError,
        pickle.UnpicklingError,
        SafetensorError,
        CheckpointingException,
        CheckpointException,
    ) as error:
        raise DataError(
            f"checkpoint {folder}: expected files that can be read, got: {_in_brief(error)}; "
            f"resume from another one (resume=FOLDER), or start anew (resume=never)"
        ) from error
    learner.model.module.load_state_dict(loaded["model"])
    settings = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in learner.optimizer.param_groups
    ]
    learner.optimizer.load_state_dict(loaded["optimizer"])
    for group, of_config in zip(learner.optimizer.param_groups, settings, strict=True):
        group.update(of_config)
    learner.scheduler.load_state_dict(state["scheduler"])
    _set_random_state(random_state)
    return state["run"]


def _sharded_state(learner: Learner, *, is_loading: bool) -> dict[str, Any]:
    model = learner.model.module.sharded_state_dict()
    optimizer = learner.optimizer.sharded_state_dict(
        model,
        is_loading=is_loading,
        metadata={"distrib_optim_sharding_type": "fully_reshardable"},
    )
    return {"model": model, "optimizer": optimizer}


def _write_parts(folder: Path, learner: Learner) -> None:
    from megatron.core import dist_checkpointing

    _results_stay_in_process()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dist_checkpointing.save(_sharded_state(learner, is_loading=False), str(folder))
    save_file(_random_state(), folder / _random_name(learner))


def _write_state(folder: Path, learner: Learner, run_state: dict[str, Any]) -> None:
    state = {
        "world_size": learner.parallel.world_size,
        "made_by": _kind(learner),
        "scheduler": learner.scheduler.state_dict(),
        "run": run_state,
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / STATE).write_text(json.dumps(state, indent=2))


def _read_state(folder: Path, learner: Learner) -> dict[str, Any]:
    """What run_state.json says, once all files are there and it is of this learner's kind."""
    otherwise = "resume from another one (resume=FOLDER), or start anew (resume=never)"
    try:
        state = json.loads((folder / STATE).read_text())
        sizes, kind = state["bytes"], state["made_by"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise DataError(
            f"checkpoint {folder}: expected a whole {STATE}, got: {_in_brief(error)}; {otherwise}"
        ) from error
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            got = "no such file" if found is None else f"{found}"
            raise DataError(
                f"checkpoint {folder}: expected {name} of {size} bytes, got {got}; {otherwise}"
            )
    for key, expected in _kind(learner).items():
        if kind.get(key) != expected:
            raise DataError(
                f"checkpoint {folder}: expected one of a model and optimizer as in this run's "
                f"config, with {key}={expected}, got {key}={kind.get(key)}; {otherwise}"
            )
    return state


def _kind(learner: Learner) -> dict[str, Any]:
    """What must be equal for a checkpoint to be loaded; the layout need not be."""
    geometry = asdict(learner.geometry)
    return geometry | {
        "dtype": str(learner.model.config.params_dtype),
        "has_distributed_optimizer": learner.model.ddp_config.use_distributed_optimizer,
    }


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


def _read_random_state(
    folder: Path, learner: Learner, saved_world_size: int
) -> dict[str, torch.Tensor]:
    """Empty on another layout, which starts afresh: nothing random decides a run's course (seeds
    derive from step and prompt).
    """
    if saved_world_size != learner.parallel.world_size:
        return {}
    return load_file(folder / _random_name(learner))


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    from megatron.core import tensor_parallel

    if state:
        torch.set_rng_state(state.pop("torch"))
        tensor_parallel.get_cuda_rng_tracker().set_states(
            {name.removeprefix("megatron."): value for name, value in state.items()}
        )


def _check_space(folder: Path, learner: Learner) -> None:
    """Fail before writing where the disk surely cannot hold the checkpoint."""
    num_parameters = sum(torch.Size(shape).numel() for _, shape in learner.tensor_shapes())
    needed = num_parameters * _bytes_per_parameter(learner)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(f"{needed / 2**20:.1f} MiB needed")


def _bytes_per_parameter(learner: Learner) -> int:
    """Of a float32 model the plain optimizer steps the weights themselves; otherwise it holds main
    weights of its own.
    """
    dtype: torch.dtype = learner.model.config.params_dtype
    is_main = dtype == torch.float32 and not learner.model.ddp_config.use_distributed_optimizer
    return BYTES_PER_PARAMETER + (0 if is_main else dtype.itemsize)


def _sync_to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    """A file's bytes, or a folder's own names, which a rename in it changes."""
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


def _delete_old(folder: Path, newest: str, keep: int) -> None:
    """Keep the newest and those before it; what has a later step is of a run that was given up."""
    by_age = sorted(folder.glob("step_*"), key=lambda path: (path.name <= newest, path.name))
    for old in by_age[:-keep]:
        shutil.rmtree(old)
    for leftover in folder.glob(".partial_step_*"):  # of a run that was killed while it saved
        shutil.rmtree(leftover)
