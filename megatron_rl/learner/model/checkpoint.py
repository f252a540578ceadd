"""[imports megatron] What a checkpoint holds, and how it is loaded: everything that a run needs to
continue as if it had never stopped.

A checkpoint is a folder `checkpoints/step_000012`: Megatron's distributed checkpoint of model and
optimizer (float32 main weights and moments), which any other TP x PP x DP layout can read;
`run_state.json` (step, lambda, schedule, data cursor, and the size of every file); every rank's
random state; and `SHA256SUMS` (checkpoint_sums.py). checkpoint_writer.py writes it.

Every rank checks all that can be checked without reading the tensors (a missing or truncated file,
a different model) before the ranks read together. In this way all ranks fail with the same error
and none waits for another.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_rl.errors import DataError
from megatron_rl.learner.model.checkpoint_files import STATE
from megatron_rl.learner.model.optimizer_state import (
    follow_config,
    load_optimizer,
    load_settings,
    sharded_optimizer,
)
from megatron_rl.learner.model.training_model import TrainingModel
from megatron_rl.weights.conversion.metadata import read_metadata, without_code

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def load_checkpoint(folder: Path, trained: TrainingModel) -> dict[str, Any]:
    """Load model, optimizer, schedule and random state, saved by any layout, and return the run
    state. A collective over all ranks.

    Learning rate, betas and the other settings of the optimizer are those of this run's config.
    Only the position in the schedule is taken from the checkpoint.

    Raises:
        DataError: the checkpoint is missing, truncated or of a different model.
    """
    state = _read_state(folder, kind_of(trained))
    with _reading(folder), without_code():
        read_metadata(folder)  # told by every rank alike, before they read together
        sharded = sharded_state(trained, is_loading=True)
        has_extra_states = bool(trained.parts[0].config.fp8)
        loaded = _load(sharded, folder, has_extra_states=has_extra_states)
        if has_distributed_optimizer(trained):
            load_optimizer(trained.optimizer, _sharded_model(trained.modules), folder)
        random_state = _read_random_state(folder, trained, state["world_size"])
    _load_parts(trained.modules, loaded["model"])
    settings = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in trained.optimizer.param_groups
    ]
    follow_config(loaded["optimizer"], trained.optimizer.param_groups)
    if has_distributed_optimizer(trained):
        load_settings(trained.optimizer, loaded["optimizer"])
    else:
        trained.optimizer.load_state_dict(loaded["optimizer"])
    for group, of_config in zip(trained.optimizer.param_groups, settings, strict=True):
        group.update(of_config)
    trained.scheduler.load_state_dict(state["scheduler"])
    _set_random_state(random_state)
    return state["run"]


def _load(sharded: dict[str, Any], folder: Path, *, has_extra_states: bool) -> dict[str, Any]:
    """The tensors that `sharded` describes.

    Args:
        has_extra_states: whether the modules' extra states are needed. Transformer Engine unpickles
            them (module/base.py, `set_extra_state`), so without FP8 they are not given to it.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        known = load_sharded_metadata(str(folder)) if has_extra_states else {}
        for state in sharded["model"].values():
            for name in [name for name in state if _is_extra(name)]:
                if state[name].unique_key not in known:
                    del state[name]
        return dist_checkpointing.load(sharded, str(folder))


def _load_parts(parts: Sequence[GPTModel], loaded: dict[str, Any]) -> None:
    """Set the parts' weights; RuntimeError if a weight is missing or has another shape."""
    for number, part in enumerate(parts):
        missing = part.load_state_dict(loaded[str(number)], strict=False).missing_keys
        weights = [name for name in missing if not _is_extra(name)]
        if weights:
            raise RuntimeError(f"expected {weights[0]}, got none")


def _is_extra(name: str) -> bool:
    """Whether an entry of a module's state holds the scales of FP8, which Transformer Engine's
    modules measure anew if they are absent. Megatron's modules have such entries too, but not for
    norms.
    """
    return name.endswith("_extra_state")


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Raises DataError in place of the errors that a damaged checkpoint causes."""
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        yield
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
            f"checkpoint {folder}: expected files that can be read, got: {in_brief(error)}; "
            f"resume from another one (resume=FOLDER), or start anew (resume=never)"
        ) from error


def in_brief(error: BaseException) -> str:
    """The error in one line. Of an exception that collects all ranks' errors, the first one."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _sharded_model(parts: Sequence[GPTModel]) -> dict[str, Any]:
    return {str(number): part.sharded_state_dict() for number, part in enumerate(parts)}


def sharded_state(trained: TrainingModel, *, is_loading: bool) -> dict[str, Any]:
    """The tensors of model and optimizer, as Megatron's shards. A collective over all ranks."""
    model = _sharded_model(trained.modules)
    if has_distributed_optimizer(trained):
        # While loading, the optimizer's tensors are read afterwards, a part of them at a time.
        return (
            {"model": model}
            if is_loading
            else {
                "model": model,
                "optimizer": sharded_optimizer(trained.optimizer, model),
            }
        )
    optimizer = trained.optimizer.sharded_state_dict(
        model, is_loading=is_loading, metadata={"chained_optim_avoid_prefix": True}
    )
    return {"model": model, "optimizer": optimizer}


def has_distributed_optimizer(trained: TrainingModel) -> bool:
    """Whether the optimizer's state is divided over the data-parallel ranks."""
    return trained.parts[0].ddp_config.use_distributed_optimizer


def _read_state(folder: Path, expected_kind: dict[str, Any]) -> dict[str, Any]:
    """The contents of run_state.json, after checking that all files are complete and that the
    checkpoint is of the expected model (`kind_of`).
    """
    otherwise = "resume from another one (resume=FOLDER), or start anew (resume=never)"
    try:
        state = json.loads((folder / STATE).read_text())
        sizes, kind = state["bytes"], state["made_by"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise DataError(
            f"checkpoint {folder}: expected a whole {STATE}, got: {in_brief(error)}; {otherwise}"
        ) from error
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            got = "no such file" if found is None else f"{found}"
            raise DataError(
                f"checkpoint {folder}: expected {name} of {size} bytes, got {got}; {otherwise}"
            )
    for key, expected in expected_kind.items():
        if kind.get(key) != expected:
            raise DataError(
                f"checkpoint {folder}: expected one of a model and optimizer as in this run's "
                f"config, with {key}={expected}, got {key}={kind.get(key)}; {otherwise}"
            )
    return state


def kind_of(trained: TrainingModel) -> dict[str, Any]:
    """The properties that must match for a checkpoint to be loaded. The layout may differ."""
    geometry = asdict(trained.geometry)
    return geometry | {
        "dtype": str(trained.parts[0].config.params_dtype),
        "has_distributed_optimizer": has_distributed_optimizer(trained),
    }


def random_name(trained: TrainingModel) -> str:
    """The name of the file of this rank's random state."""
    return f"random_state_rank_{trained.parallel.rank:05d}.safetensors"


def random_state() -> dict[str, torch.Tensor]:
    """This rank's random state, by name."""
    from megatron.core import tensor_parallel

    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {"torch": torch.get_rng_state()} | {
        f"megatron.{name}": state for name, state in tracked.items()
    }


def _read_random_state(
    folder: Path, trained: TrainingModel, saved_world_size: int
) -> dict[str, torch.Tensor]:
    """This rank's random state. Empty if the number of ranks has changed; the ranks then start with
    new random states. This does not affect the run, because its seeds derive from step and prompt.
    """
    if saved_world_size != trained.parallel.world_size:
        return {}
    return load_file(folder / random_name(trained))


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    from megatron.core import tensor_parallel

    if state:
        torch.set_rng_state(state.pop("torch"))
        tensor_parallel.get_cuda_rng_tracker().set_states(
            {name.removeprefix("megatron."): value for name, value in state.items()}
        )
