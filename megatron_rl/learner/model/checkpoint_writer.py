"""[imports megatron] Writes a run's checkpoints while the run goes on, one at a time.

`save` holds the run for a copy of the state to host memory. A thread of each rank then writes the
copy and computes the SHA-256 of its files. Once all ranks have written, `advance` completes the
checkpoint: rank 0 adds what describes the files, and gives the checkpoint its name. A failed write
is told by the next `advance`, on every rank.

The thread is one of the rank's own process. A forked process, in which Megatron's asynchronous
saving writes, would go on writing after its rank was killed, when the run has been started again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_rl.errors import DataError
from megatron_rl.learner.model import checkpoint_files
from megatron_rl.learner.model.checkpoint import (
    has_distributed_optimizer,
    in_brief,
    kind_of,
    random_name,
    random_state,
    sharded_state,
)
from megatron_rl.learner.model.checkpoint_files import STATE
from megatron_rl.learner.model.checkpoint_share import Share, on_host, plan_share, write_share
from megatron_rl.learner.model.checkpoint_sums import SUMS, file_sum, sums_text
from megatron_rl.learner.model.export import tensor_shapes
from megatron_rl.learner.model.training_model import TrainingModel

# A float32 main weight and two moments. The model's own weights are added if they are separate.
BYTES_PER_PARAMETER = 12
COMMON = "common.pt"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a checkpoint has taken, on the slowest rank. Example: `Written(number=1, step=12,
    num_bytes=4_000, held_seconds=0.2, write_seconds=1.5, sum_seconds=0.4)`.
    """

    number: int  # 1 for the first one of its writer
    step: int
    num_bytes: int  # of all ranks' files
    held_seconds: float  # for which `save` held the run
    write_seconds: float  # of the thread
    sum_seconds: float  # of these, for SHA-256

    def __str__(self) -> str:
        return (
            f"checkpoint of step {self.step}: {self.num_bytes / 1e6:.1f} MB; the step was held for "
            f"{self.held_seconds:.2f} s and the files were written in {self.write_seconds:.2f} s, "
            f"of which SHA-256 took {self.sum_seconds:.2f} s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A checkpoint that is being written. Example: `_Pending(step=12, storage=..., metadata=...,
    state={...}, share=Future(), held_seconds=0.2)`.
    """

    step: int
    storage: Any  # Megatron's writer
    metadata: Any  # of all ranks' tensors; on rank 0
    state: dict[str, Any]  # of run_state.json, when `save` was called
    share: Future[Share]
    held_seconds: float


class CheckpointWriter:
    """Writes checkpoints to `folder/step_<step>`. Every method is a collective over all ranks.

    Args:
        keep: how many checkpoints to keep, at least 1; older ones are deleted once a new one is
            complete.
        is_asynchronous: False: `save` returns when the checkpoint is complete.
    """

    def __init__(
        self, folder: Path, trained: TrainingModel, *, keep: int, is_asynchronous: bool
    ) -> None:
        self._folder = folder
        self._trained = trained
        self._keep = keep
        self._is_asynchronous = is_asynchronous
        self._pending: _Pending | None = None
        self._num_written = 0
        # A run that ends with an error does not wait for it (process/command.py).
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, run_state: dict[str, Any], *, step: int) -> Written | None:
        """Begin a step's checkpoint; the one before is completed first.

        Args:
            run_state: plain JSON values; the same on every rank.
        Returns:
            What the checkpoint took, if it is complete.
        Raises:
            DataError: as in `finish`, of the checkpoint before or of this one.
        """
        started = time.monotonic()
        self.finish()
        is_first = self._trained.parallel.rank == 0
        self._raise_first(step, self._prepare if is_first else None, step)
        self._trained.finish_weights()
        plan = plan_share(
            checkpoint_files.partial_folder(self._folder, step),
            sharded_state(self._trained, is_loading=False),
        )
        storage, numbers = plan.storage, random_state()
        storage.write_buckets = on_host(storage.write_buckets, self._trained.parallel.device)
        state = {
            "world_size": self._trained.parallel.world_size,
            "made_by": kind_of(self._trained),
            "scheduler": self._trained.scheduler.state_dict(),
            "run": run_state,
        }
        others = {random_name(self._trained): lambda path: save_file(numbers, path)}
        if is_first:
            others[COMMON] = lambda path: path.write_bytes(plan.common)
        self._pending = _Pending(
            step=step,
            storage=storage,
            metadata=plan.metadata,
            state=json.loads(json.dumps(state)),  # a copy of what the next step changes
            share=self._thread.submit(write_share, storage, others),
            held_seconds=time.monotonic() - started,
        )
        return None if self._is_asynchronous else self.finish()

    def advance(self) -> Written | None:
        """Complete the checkpoint that is being written, if all ranks have written their share, and
        return what it took; None if there is none or it is not complete.

        Raises:
            DataError: see `finish`.
        """
        pending = self._pending
        if pending is None:
            return None
        if not all(self._from_all(pending.share.done())):
            return None
        return self.finish()

    def finish(self) -> Written | None:
        """Like `advance`, but waits until all ranks have written.

        Raises:
            DataError: the disk is full or not writable (the earlier checkpoints are unchanged), or
                an older checkpoint cannot be deleted (the new one is complete and is the latest).
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        self._raise_first(pending.step, pending.share.result)
        shares = self._from_all(pending.share.result())
        is_first = self._trained.parallel.rank == 0
        self._raise_first(pending.step, self._complete if is_first else None, pending, shares)
        error = self._first_error(self._delete_old if is_first else None, pending.step)
        if error is not None:
            raise DataError(
                f"checkpoint of step {pending.step} in {self._folder}: it is whole and the latest, "
                f"but older ones beyond checkpoint.keep={self._keep} could not be deleted, got: "
                f"{error}; delete them by hand, resume=auto goes on from it"
            )
        self._num_written += 1
        return Written(
            number=self._num_written,
            step=pending.step,
            num_bytes=sum(share.num_bytes for share in shares),
            held_seconds=pending.held_seconds,
            write_seconds=max(share.write_seconds for share in shares),
            sum_seconds=max(share.sum_seconds for share in shares),
        )

    def _prepare(self, step: int) -> None:
        checkpoint_files.start_partial(self._folder, step)
        _check_space(self._folder, self._trained)

    def _complete(self, pending: _Pending, shares: Iterable[Share]) -> None:
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

        partial = checkpoint_files.partial_folder(self._folder, pending.step)
        pending.storage.finish(pending.metadata, [share.results for share in shares])
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / STATE).write_text(json.dumps(pending.state | {"bytes": sizes}, indent=2))
        sums = {name: each for share in shares for name, each in share.sums.items()}
        for name in (*sizes, STATE):
            if name not in sums:
                sums[name] = file_sum(partial / name)
        (partial / SUMS).write_text(sums_text(sums))
        checkpoint_files.complete(self._folder, pending.step)

    def _delete_old(self, step: int) -> None:
        checkpoint_files.delete_old(self._folder, step, self._keep)

    def _raise_first(self, step: int, part: Callable[..., Any] | None, *arguments: Any) -> None:
        """Do this rank's part; raise DataError on every rank if that of any rank fails."""
        error = self._first_error(part, *arguments)
        if error is None:
            return
        if self._trained.parallel.rank == 0:
            partial = checkpoint_files.partial_folder(self._folder, step)
            shutil.rmtree(partial, ignore_errors=True)
        raise DataError(
            f"checkpoint of step {step} in {self._folder}: expected to write it whole, got: "
            f"{error}; free some disk space or change run_dir; earlier checkpoints are untouched"
        )

    def _first_error(self, part: Callable[..., Any] | None, *arguments: Any) -> str | None:
        """Do this rank's part of the work, if it has one, and return the first error of any rank,
        the same on every rank.
        """
        error = None
        try:
            if part is not None:
                part(*arguments)
        except WRITE_ERRORS as caught:
            # torch's writer reports "unexpected pos" when the disk is full
            free = shutil.disk_usage(self._folder).free if self._folder.is_dir() else 0
            error = f"{in_brief(caught)} ({free / 2**20:.1f} MiB free on that disk)"
        return next((each for each in self._from_all(error) if each is not None), None)

    def _from_all(self, value: Any) -> list[Any]:
        return self._trained.parallel.from_all_ranks(value)


def _check_space(folder: Path, trained: TrainingModel) -> None:
    """Raise OSError, before anything is written, if the disk has too little free space."""
    num_parameters = sum(torch.Size(shape).numel() for _, shape in tensor_shapes(trained.geometry))
    needed = num_parameters * bytes_per_parameter(trained)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(f"{needed / 2**20:.1f} MiB needed")


def bytes_per_parameter(trained: TrainingModel) -> int:
    """The size of a checkpoint on disk, in bytes per parameter. With a float32 model the plain
    optimizer updates the model's weights directly; otherwise it has separate main weights.
    """
    dtype: torch.dtype = trained.parts[0].config.params_dtype
    is_main = dtype == torch.float32 and not has_distributed_optimizer(trained)
    return BYTES_PER_PARAMETER + (0 if is_main else dtype.itemsize)
