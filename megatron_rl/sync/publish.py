"""From a learner's full tensors to every rollout engine, through shared memory on one host.

In, on one rank: tensors named as Hugging Face does, in layer order, from a lazy iterator. Out:
engines that serve them, all under the same version, and a report of who received what. Per update:
pause (wait for what is in flight) -> start -> manifest -> buckets -> finish -> reset the prefix
cache and look at its answer -> resume. All engines read the same bucket, so the extra memory is one
bucket for the sender, and one layer for each engine.

The parity probe cannot stand before resume: a paused vLLM accepts a request and does not schedule
it (vllm/v1/core/sched/scheduler.py, `PauseState.PAUSED_NEW`). So the caller sends no prompt before
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
from megatron_rl.engine.http import EngineControl
from megatron_rl.errors import SyncError
from megatron_rl.records import EngineAddress
from megatron_rl.sync.source import TensorSource
from megatron_rl.sync.transports.segment import Segment
from megatron_rl.sync.wire import (
    ALIGNMENT,
    DIGEST_BYTES,
    Bucket,
    Manifest,
    TensorSpec,
    bucket_to_json,
    manifest_to_json,
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
    """Moves weights into engines on this host. A context manager; nothing of it outlives the
    process.

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
            received = self._received(sent, world_sizes, checksums)
            with _timed(seconds, "finish"):
                self._on_all(lambda engine: engine.finish(version))
            with _timed(seconds, "reset"):
                self._on_all(lambda engine: engine.reset_prefix_cache())
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            self._on_all(lambda engine: engine.abandon(reason))
            raise
        with _timed(seconds, "resume"):
            self._on_all(lambda engine: engine.resume())
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
        world_sizes = self._on_all(lambda engine: engine.world_size())
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
        """Pause all. If that fails, the engines that were serving before go on with what they have.

        An engine that was paused already stays so: it may hold half of an earlier update.
        """
        was_paused = dict(zip(self._engines, self._on_all(lambda engine: engine.is_paused())))
        try:
            with _timed(seconds, "pause"):
                self._on_all(lambda engine: engine.pause())
        except SyncError:
            self._on_all(lambda engine: None if was_paused[engine] else _resume_whole(engine))
            raise

    def _send(
        self,
        specs: Sequence[TensorSpec],
        buckets: Sequence[Bucket],
        tensors: Iterable[tuple[str, torch.Tensor]],
        seconds: dict[str, float],
    ) -> list[str]:
        """Fill a bucket, let every engine load it, fill the next. Returns a checksum per spec."""
        source = TensorSource(specs, tensors)
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

    def _fill(self, bucket: Bucket, source: TensorSource) -> dict[int, str]:
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
        """Run on every engine at once and wait for all, also when one fails; the first error
        wins.
        """
        futures = [self._pool.submit(call, engine) for engine in self._engines]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]


def _start(engine: EngineControl) -> None:
    """Begin an update; end one that a dead or failed sender left open, once.

    vLLM refuses a start while an update is active (vllm/v1/worker/gpu_worker.py), and only a
    failing `/update_weights` makes it inactive; that is what `abandon` is for.
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
