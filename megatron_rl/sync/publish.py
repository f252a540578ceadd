"""The sending half of the update protocol: sends one version of the weights from the learner to
every engine.

The learner's tensors are read under their Hugging Face names, in layer order, from lazy iterators:
by this process, source 0, and by the other sources of the transport (`sync/contribute.py`), each
its own. After an update all engines serve these tensors under one version, and a report says what
each of them received. The phases of an update are: pause (and wait for the requests in flight),
start, manifest, buckets, finish, reset of the prefix cache (whose answer is checked), resume. A
transport (`sync/transports/`) carries the bytes. This module calls the phases in order, checks the
receipts, and makes sure that no engine serves a partial update. `sync/receive.py` is the receiving
half.

An update needs memory for one bucket on the sender, or for two if it fills one while the other is
sent, and for a bucket and a layer on each engine.

The parity probe can run only after resume, because a paused vLLM accepts a request but does not
schedule it (vllm/v1/core/sched/scheduler.py, `PauseState.PAUSED_NEW`). Therefore the caller must
not send other prompts until the probe (`sync/probe.py`) has passed.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import torch

from megatron_rl.config.loop import SyncConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.http import EngineControl
from megatron_rl.errors import SilentEngineError, SourceLostError, SyncError
from megatron_rl.process.loopback import HOST
from megatron_rl.sync.engine_calls import EngineCalls, nothing
from megatron_rl.sync.source import TensorSource, WeightStream
from megatron_rl.sync.sources import Sources
from megatron_rl.sync.transports.transport import Bucket, Transfer, sender_class
from megatron_rl.sync.wire import (
    Manifest,
    TensorSpec,
    bucket_bytes_of,
    bucket_to_json,
    manifest_to_json,
    plan_buckets,
    total_checksum,
    wire_specs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """A report of one update: the data sent, the data received, and the time of each phase.

    Example: `PublishReport(version=7, num_bytes=6430648, num_buckets=2, checksum="9c..",
    received={"http://127.0.0.1:18400": ("9c..",)}, checksums={"model.norm.weight": "4e..", ...},
    seconds={"pause": 0.003, "send": 0.004, "load": 0.02, "finish": 0.01, ...})`.
    """

    version: int
    num_bytes: int  # size of the tensors as they are sent
    num_buckets: int
    checksum: str  # of all names, dtypes, shapes and bytes that were sent
    received: dict[str, tuple[str, ...]]  # by url: the same checksum, computed by each worker
    checksums: dict[str, str]  # by name, in the order sent
    # keys: connect, pause, start, send (gather, cast, copy and checksum in the learner, of this
    # source or until another one has done it), load (the
    # transport and the engines), finish, reset, resume, total
    seconds: dict[str, float]


class Publisher:
    """Publishes weights to engines. A context manager; it leaves no resources after the process.

    Args:
        addresses: the engines; all of them receive the same weights at the same time.
        config: the transport, the size of a bucket and the timeout of every call.
        wire_dtype: floating-point tensors are cast to this dtype before they are sent; None sends
            them unchanged.
        sources: the processes that send tensors, of which this is source 0; None: it is the only
            one.
        drain_seconds: added to the timeout of the pause, in which requests end that are in flight.
        silence_seconds: how long an engine, by URL, may answer no health checks, before an update
            and in its pause.
        leave_out: is told the URL of an engine that has answered none for so long, and why.
        control: creates the client of an engine's weight routes from its address and the timeout.
    """

    def __init__(
        self,
        addresses: Sequence[EngineAddress],
        config: SyncConfig,
        *,
        wire_dtype: torch.dtype | None,
        sources: Sources | None = None,
        drain_seconds: float = 0.0,
        silence_seconds: Callable[[str], float] = lambda url: math.inf,
        leave_out: Callable[[str, str], None] = lambda url, reason: None,
        control: Callable[[EngineAddress, float], EngineControl] = EngineControl,
    ) -> None:
        if not addresses:
            raise SyncError("publisher: expected at least one engine, got none")
        self._bucket_bytes = bucket_bytes_of(config.bucket_mib)
        self._wire_dtype = wire_dtype
        self._transport_name = config.transport
        self._sources = sources or Sources(None)
        self._running_requests = config.running_requests
        self._drain_seconds = drain_seconds
        self._silence_seconds, self._leave_out = silence_seconds, leave_out
        self._sender = sender_class(self._transport_name)(
            source=0,
            num_sources=self._sources.count,
            timeout_seconds=config.timeout_seconds,
        )
        self._all = [control(address, config.timeout_seconds) for address in addresses]
        self._engines = list(self._all)  # those that take part
        self._host_of = {
            engine: urlsplit(address.url).hostname or HOST
            for engine, address in zip(self._all, addresses, strict=True)
        }
        self._calls = EngineCalls(len(self._all))

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the connections and the transport."""
        self._calls.close()
        for engine in self._all:
            engine.close()
        self._sender.close()

    def sleep(self, urls: Collection[str]) -> dict[str, str]:
        """Let these engines free their memory; by URL, why one does not."""
        return self._calls.failures(self._named(urls), lambda engine: engine.sleep())

    def wake(self, urls: Collection[str]) -> dict[str, str]:
        """Wake these engines, with the weights that they had; by URL, why one does not."""
        return self._calls.failures(self._named(urls), lambda engine: engine.wake())

    def choose(self, urls: Collection[str]) -> None:
        """From now on these engines take part. An engine may have been started again, so the
        transport connects to all of them anew.
        """
        self._engines = self._named(urls)
        self._sender.close()

    def publish(self, stream: WeightStream, *, version: int) -> PublishReport:
        """Send one version of the weights to every engine and make the engines serve it.

        Args:
            stream: the specs of all tensors, and the tensors that this process sends, consumed
                once, one tensor at a time.
            version: the engines report this version with every token that they sample from now on.

        Raises:
            SyncError: the update failed; the message names engine, phase and tensor. If it failed
                before start, the engines continue with their old weights. If it failed later, they
                remain paused and poisoned until a publish succeeds. SourceLostError: another source
                is gone, and no publish can succeed.
        """
        self._sources.open()
        try:
            return self._publish(stream, version)
        except SourceLostError:
            raise
        except SyncError as error:
            self._sources.stop(str(error))
            raise

    def _publish(self, stream: WeightStream, version: int) -> PublishReport:
        seconds: dict[str, float] = {}
        begin = time.perf_counter()
        sent = wire_specs(stream.specs, self._wire_dtype)
        manifest = Manifest(update=secrets.token_hex(8), specs=tuple(sent))
        with _timed(seconds, "connect"):
            self._on_all(self._check_alive)
            num_workers = self._connect(len(sent))
        self._pause(seconds)
        try:
            with _timed(seconds, "start"):
                self._on_all(_start)
                self._on_all(
                    lambda engine: engine.update(
                        "manifest", {"manifest": manifest_to_json(manifest)}
                    )
                )
            buckets = plan_buckets(sent, self._bucket_bytes, stream.sources)
            checksums = self._send(buckets, TensorSource(sent, stream.tensors), sent, seconds)
            received = self._received(sent, num_workers, checksums)
            with _timed(seconds, "finish"):
                self._on_all(lambda engine: engine.finish(version))
            with _timed(seconds, "reset"):
                self._on_all(self._reset)
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
        """Connect the transport to every engine. This is done before each update, because an engine
        may have been restarted.

        Returns the number of workers of each engine.
        """
        num_workers = self._on_all(lambda engine: engine.world_size())
        offers = self._sender.offer(
            Transfer(
                bucket_bytes=self._bucket_bytes,
                num_tensors=num_tensors,
                num_workers=tuple(num_workers),
                hosts=tuple(self._host_of[engine] for engine in self._engines),
            )
        )
        self._sources.offer(offers)
        offer_of = dict(zip(self._engines, offers, strict=True))
        self._on_all(
            lambda engine: engine.initialize(
                {
                    "transport": self._transport_name,
                    "num_tensors": num_tensors,
                    "offer": offer_of[engine],
                }
            ),
            meanwhile=lambda: self._sender.connect(offers),
        )
        return num_workers

    def _pause(self, seconds: dict[str, float]) -> None:
        """Pause all engines. If one fails, the engines that were serving before are resumed.

        An engine that was already paused remains paused, because it may hold a partial update.
        """
        was_paused = dict(zip(self._engines, self._on_all(lambda engine: engine.is_paused())))
        try:
            with _timed(seconds, "pause"):
                self._on_all(self._pause_one)
        except SyncError:
            self._on_all(lambda engine: None if was_paused[engine] else _resume_whole(engine))
            raise

    def _pause_one(self, engine: EngineControl) -> None:
        with self._leaving_out(engine) as silence:
            if self._running_requests == "wait":
                engine.pause(drain_seconds=self._drain_seconds, silence_seconds=silence)
            else:
                engine.pause(mode="keep", silence_seconds=silence)

    def _check_alive(self, engine: EngineControl) -> None:
        """Find an engine that is frozen before a call that it may rightly answer late."""
        with self._leaving_out(engine) as silence:
            if not math.isinf(silence):
                engine.check_alive(silence)

    @contextmanager
    def _leaving_out(self, engine: EngineControl) -> Iterator[float]:
        """The seconds that this engine may be silent; an engine that is so longer is told."""
        try:
            yield self._silence_seconds(engine.url)
        except SilentEngineError as error:
            self._leave_out(engine.url, str(error))
            raise

    def _reset(self, engine: EngineControl) -> None:
        """Discard the cache of the old weights. A running request that keeps its own blocks also
        keeps those that it shares with requests to come.
        """
        if self._running_requests != "keep":
            engine.reset_prefix_cache(with_running=self._running_requests == "recompute")

    def _send(
        self,
        buckets: Sequence[Bucket],
        source: TensorSource,
        specs: Sequence[TensorSpec],
        seconds: dict[str, float],
    ) -> list[str]:
        """Fill each bucket in turn and have every engine load it. Returns a checksum per spec."""
        checksums: list[str] = []
        filled: dict[int, dict[int, str]] = {}  # ahead of their turn: by bucket, as `fill` returns

        def fill(bucket: Bucket) -> None:
            filled[bucket.index] = source.fill(bucket, self._sender.buffer)

        def send(bucket: Bucket) -> None:
            self._sender.send(bucket)
            following = buckets[bucket.index + 1 : bucket.index + 2]
            if following and following[0].source == 0 and self._sender.is_free_after_send:
                fill(following[0])

        for bucket in buckets:
            names = (
                f"{specs[bucket.pieces[0].tensor].name} to {specs[bucket.pieces[-1].tensor].name}"
            )
            phase = f"bucket {bucket.index + 1} of {len(buckets)} ({names})"
            is_own = bucket.source == 0
            with _timed(seconds, "send"):
                if is_own and bucket.index not in filled:
                    fill(bucket)
                elif not is_own:
                    filled[bucket.index] = self._sources.checksums(bucket.source, phase)
            completed = filled.pop(bucket.index)
            checksums.extend(completed.values())
            body = {"bucket": bucket_to_json(bucket, completed)}
            with _timed(seconds, "load"):
                self._on_all(
                    lambda engine, p=phase, b=body: engine.update(p, b),
                    meanwhile=partial(send, bucket) if is_own else nothing,
                )
        source.check_exhausted()
        self._sources.finish()
        return checksums

    def _received(
        self, specs: Sequence[TensorSpec], num_workers: Sequence[int], checksums: Sequence[str]
    ) -> dict[str, tuple[str, ...]]:
        """The checksum of the whole update according to each worker's receipts, by url.

        Raises SyncError if a worker loaded bytes that differ from those sent.
        """
        receipts = iter(self._sender.receipts())
        received = {}
        for engine, count in zip(self._engines, num_workers):
            totals = []
            for worker in range(count):
                digests = [digest.hex() for digest in next(receipts)]
                for spec, sent, got in zip(specs, checksums, digests, strict=True):
                    if sent != got:
                        raise SyncError(
                            f"engine {engine.url}, worker {worker}, {spec.name}: expected checksum "
                            f"{sent}, got {got}"
                        )
                totals.append(total_checksum(specs, digests))
            received[engine.url] = tuple(totals)
        return received

    def _named(self, urls: Collection[str]) -> list[EngineControl]:
        return [engine for engine in self._all if engine.url in urls]

    def _on_all(
        self,
        call: Callable[[EngineControl], object],
        meanwhile: Callable[[], None] = nothing,
    ) -> list:
        return self._calls.on_all(self._engines, call, meanwhile)


def _start(engine: EngineControl) -> None:
    """Begin an update. If a dead or failed sender has left another update open, end that one first.

    vLLM refuses a start while an update is active (vllm/v1/worker/gpu_worker.py). Only a failing
    `/update_weights` makes the update inactive; `abandon` sends such a request.
    """
    try:
        engine.start()
    except SyncError:
        engine.abandon("another update begins")
        engine.start()


def _resume_whole(engine: EngineControl) -> None:
    """Resume an engine whose weights have not been changed. Errors are ignored, because the caller
    is about to raise the original one.
    """
    with suppress(SyncError):
        engine.resume()


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begin
