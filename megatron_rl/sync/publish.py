"""From a learner's full tensors to every rollout engine, through shared memory on one host.

In, on one rank: tensors named as Hugging Face does, in layer order, from a lazy iterator. Out: engines
that serve them, all under the same version, and a report of who received what. Per update:
pause (wait for what is in flight) -> start -> manifest -> buckets -> finish -> reset the prefix cache
and look at its answer -> resume. All engines read the same bucket, so the extra memory is one bucket
for the sender, and one layer for each engine.

The parity probe cannot stand before resume: a paused vLLM accepts a request and does not schedule it
(vllm/v1/core/sched/scheduler.py, `PauseState.PAUSED_NEW`). So the caller sends no prompt before
`sync/probe.py` has passed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

import torch

from megatron_rl.config import SyncConfig
from megatron_rl.errors import SyncError
from megatron_rl.records import EngineAddress
from megatron_rl.sync.control import EngineControl
from megatron_rl.sync.segment import Segment
from megatron_rl.sync.wire import (
    ALIGNMENT,
    CASTABLE,
    DIGEST_BYTES,
    Bucket,
    Manifest,
    TensorSpec,
    bucket_to_json,
    manifest_to_json,
    new_checksum,
    plan_buckets,
    total_checksum,
    wire_specs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What one update did.

    Example: `PublishReport(version=7, num_bytes=6430648, num_buckets=2, checksum="9c..",
    received={"http://127.0.0.1:18400": ("9c..",)}, checksums={"model.norm.weight": "4e..", ...},
    seconds={"pause": 0.003, "send": 0.004, "load": 0.02, "finish": 0.01, ...})`.
    """

    version: int
    num_bytes: int  # of tensors, on the wire
    num_buckets: int
    checksum: str  # of everything that was sent: names, dtypes, shapes and bytes
    received: dict[str, tuple[str, ...]]  # by url: the same, as each worker of it computed it
    checksums: dict[str, str]  # by name, in the order sent
    seconds: dict[str, float]  # connect, pause, start, send (cast, copy and checksum; includes
    # the learner's gathering), load (engines), finish, reset, resume, total


class Publisher:
    """Moves weights into engines on this host. A context manager; nothing of it outlives the process.

    Args:
        addresses: the engines; all get the same weights, at the same time.
        config: bucket size and the timeout of every call.
        wire_dtype: floating tensors are cast to it on the way; None sends them as they come.
    """

    def __init__(
        self,
        addresses: Sequence[EngineAddress],
        config: SyncConfig,
        *,
        wire_dtype: torch.dtype | None,
    ) -> None:
        if not addresses:
            raise SyncError("publisher: expected at least one engine, got none")
        self._bucket_bytes = max(1, int(config.bucket_mib * 2**20) // ALIGNMENT) * ALIGNMENT
        self._wire_dtype = wire_dtype
        self._engines = [EngineControl(address, config.timeout_seconds) for address in addresses]
        self._pool = ThreadPoolExecutor(len(self._engines), thread_name_prefix="publish")
        self._segment: Segment | None = None

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown()
        for engine in self._engines:
            engine.close()
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def publish(
        self,
        specs: Sequence[TensorSpec],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        version: int,
    ) -> PublishReport:
        """Send one version of the weights to every engine and let them go on with it.

        Args:
            specs: what `tensors` will yield, in its order, with the learner's dtypes.
            tensors: full tensors, on any device; consumed once, one at a time.
            version: what the engines put on every token they sample from now on.

        Raises:
            SyncError: naming engine, phase and tensor. Before start, the engines go on with the
                weights they have; after it, they stay paused and poisoned until a publish succeeds.
        """
        seconds: dict[str, float] = {}
        begin = time.perf_counter()
        sent = wire_specs(specs, self._wire_dtype)
        manifest = Manifest(update=secrets.token_hex(8), specs=tuple(sent))
        with _timed(seconds, "connect"):
            world_sizes = self._connect(len(sent))
        self._pause(seconds)
        try:
            with _timed(seconds, "start"):
                self._on_all(_start)
                self._on_all(
                    lambda engine: engine.update(
                        "manifest", {"manifest": manifest_to_json(manifest)}
                    )
                )
            buckets = plan_buckets(sent, self._bucket_bytes)
            checksums = self._send(sent, buckets, tensors, seconds)
            with _timed(seconds, "finish"):
                self._on_all(lambda engine: engine.finish(version))
            received = self._received(sent, world_sizes, checksums)
            with _timed(seconds, "reset"):
                self._on_all(EngineControl.reset_prefix_cache)
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            self._on_all(lambda engine: engine.abandon(reason))
            raise
        with _timed(seconds, "resume"):
            self._on_all(EngineControl.resume)
        seconds["total"] = time.perf_counter() - begin
        return PublishReport(
            version=version,
            num_bytes=sum(spec.nbytes for spec in sent),
            num_buckets=len(buckets),
            checksum=total_checksum(sent, checksums),
            received=received,
            checksums=dict(zip((spec.name for spec in sent), checksums)),
            seconds=seconds,
        )

    def _connect(self, num_tensors: int) -> list[int]:
        """Show every engine the shared memory, each time anew: one may have been restarted."""
        world_sizes = self._on_all(EngineControl.world_size)
        nbytes = self._bucket_bytes + sum(world_sizes) * num_tensors * DIGEST_BYTES
        if self._segment is None or self._segment.address.nbytes < nbytes:
            if self._segment is not None:
                self._segment.close()
            self._segment = Segment.create(nbytes)
        self._segment.bytes_of(self._bucket_bytes, nbytes - self._bucket_bytes).zero_()
        first_slots = {
            engine.url: sum(world_sizes[:index]) for index, engine in enumerate(self._engines)
        }
        address = self._segment.address.to_json()
        self._on_all(
            lambda engine: engine.initialize(
                {
                    "segment": address,
                    "bucket_bytes": self._bucket_bytes,
                    "num_tensors": num_tensors,
                    "first_slot": first_slots[engine.url],
                }
            )
        )
        return world_sizes

    def _pause(self, seconds: dict[str, float]) -> None:
        try:
            with _timed(seconds, "pause"):
                self._on_all(EngineControl.pause)
        except SyncError:
            self._on_all(_resume_whole)
            raise

    def _send(
        self,
        specs: Sequence[TensorSpec],
        buckets: Sequence[Bucket],
        tensors: Iterable[tuple[str, torch.Tensor]],
        seconds: dict[str, float],
    ) -> list[str]:
        """Fill a bucket, let every engine load it, fill the next. Returns a checksum per spec."""
        source = _TensorSource(specs, tensors)
        checksums: list[str] = []
        for bucket in buckets:
            with _timed(seconds, "send"):
                completed = self._fill(bucket, source)
            checksums.extend(completed.values())
            names = (
                f"{specs[bucket.pieces[0].tensor].name} to {specs[bucket.pieces[-1].tensor].name}"
            )
            phase = f"bucket {bucket.index + 1} of {len(buckets)} ({names})"
            body = {"bucket": bucket_to_json(bucket, completed)}
            with _timed(seconds, "load"):
                self._on_all(lambda engine, p=phase, b=body: engine.update(p, b))
        source.check_exhausted()
        return checksums

    def _fill(self, bucket: Bucket, source: _TensorSource) -> dict[int, str]:
        """Copy a bucket's bytes; returns the checksums of the tensors that end in it, by index."""
        completed = {}
        for piece in bucket.pieces:
            target = self._segment.bytes_of(piece.bucket_offset, piece.nbytes)
            checksum = source.copy(piece.tensor, piece.tensor_offset, target)
            if checksum is not None:
                completed[piece.tensor] = checksum
        return completed

    def _received(
        self, specs: Sequence[TensorSpec], world_sizes: Sequence[int], checksums: Sequence[str]
    ) -> dict[str, tuple[str, ...]]:
        """What every worker wrote into its slot while it loaded, held against what was sent."""
        received = {}
        slot = 0
        for engine, world_size in zip(self._engines, world_sizes):
            totals = []
            for worker in range(world_size):
                seen = self._slot(slot, len(specs))
                for spec, sent, got in zip(specs, checksums, seen):
                    if sent != got:
                        raise SyncError(
                            f"engine {engine.url}, worker {worker}, {spec.name}: expected checksum "
                            f"{sent}, got {got}"
                        )
                totals.append(total_checksum(specs, seen))
                slot += 1
            received[engine.url] = tuple(totals)
        return received

    def _slot(self, slot: int, num_tensors: int) -> list[str]:
        length = num_tensors * DIGEST_BYTES
        digests = self._segment.bytes_of(self._bucket_bytes + slot * length, length)
        return [row.numpy().tobytes().hex() for row in digests.view(num_tensors, DIGEST_BYTES)]

    def _on_all(self, call: Callable[[EngineControl], object]) -> list:
        """Run on every engine at once and wait for all, also when one fails; the first error wins."""
        futures = [self._pool.submit(call, engine) for engine in self._engines]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]


class _TensorSource:
    """Walks the learner's iterator in step with the plan, and holds it to the specs."""

    def __init__(
        self, specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        self._specs = specs
        self._iterator = iter(tensors)
        self._index = -1
        self._flat = torch.empty(0)
        self._checksum = new_checksum()

    def copy(self, index: int, offset: int, target: torch.Tensor) -> str | None:
        """Cast bytes from `offset` of tensor `index` into `target`, [n] uint8.

        Returns the tensor's checksum when these were its last bytes.
        """
        if index != self._index:
            self._advance(index)
        spec = self._specs[index]
        first = offset // spec.dtype.itemsize
        count = target.numel() // spec.dtype.itemsize
        target.view(spec.dtype).copy_(self._flat[first : first + count])
        self._checksum.update(target.numpy())
        return self._checksum.hexdigest() if offset + target.numel() == spec.nbytes else None

    def check_exhausted(self) -> None:
        extra = next(self._iterator, None)
        if extra is not None:
            raise SyncError(
                f"publish: expected the {len(self._specs)} tensors of the specs, got {extra[0]} after them"
            )

    def _advance(self, index: int) -> None:
        spec = self._specs[index]
        item = next(self._iterator, None)
        if item is None:
            raise SyncError(
                f"publish: expected {spec.name} as tensor {index} of {len(self._specs)}, got the end"
            )
        name, tensor = item
        if name != spec.name or tuple(tensor.shape) != spec.shape:
            raise SyncError(
                f"publish: expected {spec.name} {spec.shape} as tensor {index}, "
                f"got {name} {tuple(tensor.shape)}"
            )
        if tensor.dtype != spec.dtype and not _may_cast(tensor.dtype, spec.dtype):
            raise SyncError(f"publish: expected {spec.name} in {spec.dtype}, got {tensor.dtype}")
        self._index = index
        self._flat = tensor.detach().reshape(-1)  # a view, unless the learner's is not contiguous
        self._checksum = new_checksum()


def _may_cast(source: torch.dtype, target: torch.dtype) -> bool:
    return source in CASTABLE and target in CASTABLE


def _start(engine: EngineControl) -> None:
    """Begin an update; end one that a dead or failed sender left open, once.

    vLLM refuses a start while an update is active (vllm/v1/worker/gpu_worker.py), and only a failing
    `/update_weights` makes it inactive; that is what `abandon` is for.
    """
    try:
        engine.start()
    except SyncError:
        engine.abandon("another update begins")
        engine.start()


def _resume_whole(engine: EngineControl) -> None:
    """Let an engine go on whose weights were not touched; another error is already on its way."""
    with suppress(SyncError):
        engine.resume()


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begin
