"""[imports megatron] One rank's share of a checkpoint: planned with the other ranks, copied to host
memory, and written.

Megatron plans which rank writes which part of which tensor, and writes a file of tensors. What it
does between and after these steps is replaced (checkpoint_writer.py): it would fork a process to
write in, and run collectives in which the other ranks wait for one that cannot write.
"""

from __future__ import annotations

import inspect
import io
import queue
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.learner.model.checkpoint_sums import file_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank has written. Example: `Share(results=[...], sums={"__0_0.distcp": "9f3a..."},
    num_bytes=1_000, write_seconds=0.5, sum_seconds=0.1)`.
    """

    results: list[Any]  # of torch: where each tensor lies
    sums: dict[str, str]
    num_bytes: int
    write_seconds: float
    sum_seconds: float


@dataclass(slots=True, kw_only=True)
class Plan:
    """What this rank is to write. Example on rank 0: `Plan(storage=FileSystemWriterAsync(...),
    metadata=Metadata(...), common=b"PK...")`.
    """

    storage: Any = None  # Megatron's writer, with a bucket of tensors for each file
    metadata: Any = None  # of all ranks' tensors; on rank 0
    common: bytes = b""  # of a file with what is the same on all ranks


def plan_share(folder: Path, state: dict[str, Any]) -> Plan:
    """Plan the writing of all ranks' tensors, without writing any. A collective over all ranks.

    Args:
        state: Megatron's shards, of `checkpoint.sharded_state`.
    """
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    planned = Plan()

    class Strategy(TorchDistSaveShardedStrategy):
        """Hands out the plan instead of a request to write and finish it."""

        def _get_save_and_finalize_callbacks(
            self, writer: Any, plan: Any, *_strategy: Any
        ) -> AsyncRequest:
            planned.storage, planned.metadata = writer, plan[1]
            return AsyncRequest(None, (), [])

    _results_stay_in_process()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        sharded, common = save_preprocess(state)
        strategy = Strategy("torch_dist", 1)
        # Megatron-Core 0.19 has a choice of writers, of which only its own has no other package.
        has_choice = "async_strategy" in inspect.signature(strategy.async_save).parameters
        strategy.async_save(sharded, folder, *(("mcore",) if has_choice else ()))
    common_file = io.BytesIO()
    torch.save(common, common_file)
    planned.common = common_file.getvalue()
    return planned


def on_host(buckets: Iterable[Any], device: torch.device) -> list[Any]:
    """Megatron's buckets of tensors, a bucket a file, with copies of the tensors in host memory.

    Args:
        device: the rank's. With a GPU, what is in host memory already was gathered for this
            checkpoint (optimizer_state.py), and is not copied again.
    """

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if device.type != "cpu" and tensor.device.type == "cpu":
            return tensor
        # Page-locked, so that a copy from a GPU takes its full bandwidth. torch keeps such memory
        # when it is freed, for the next checkpoint.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True)

    copied = [
        (path, name, (objects, [(item, copy(tensor)) for item, tensor in tensors]))
        for path, name, (objects, tensors) in buckets
    ]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return copied


def write_share(storage: Any, others: Mapping[str, Callable[[Path], object]]) -> Share:
    """Write this rank's files, sync them and compute their sums.

    Args:
        others: what writes the files beside those of tensors, by name.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    started, folder = time.monotonic(), Path(storage.checkpoint_dir)
    transforms = [storage.transforms] if hasattr(storage, "transforms") else []
    answers: queue.Queue[Any] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    results, names = [], list(others)
    for number, bucket in enumerate(storage.write_buckets):
        running.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, answers, running, use_fsync=True
        )
        _, outcome = answers.get()
        if isinstance(outcome, BaseException):
            raise outcome
        results += outcome
        names.append(bucket[1])
    storage.write_buckets = []  # frees the copies
    for name, write in others.items():
        write(folder / name)
    sums_started = time.monotonic()
    sums = {name: file_sum(folder / name) for name in names}
    ended = time.monotonic()
    return Share(
        results=results,
        sums=sums,
        num_bytes=sum((folder / name).stat().st_size for name in names),
        write_seconds=ended - started,
        sum_seconds=ended - sums_started,
    )


def _results_stay_in_process() -> None:
    """Give Megatron a plain queue for the writers' results. It would start a manager process for
    one, which would outlive a killed rank (dist_checkpointing/strategies/filesystem_async.py).
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
