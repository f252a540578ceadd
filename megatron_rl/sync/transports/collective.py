"""The transport over process groups, to engines on any host: NCCL if the tensors are on GPUs, gloo
if they are on CPUs.

Every source has a group of its own, with itself as rank 0 and all workers of all engines after it,
in which it broadcasts its buckets. So no tensor passes through another source, and a source's link
carries each byte about once, however many engines there are. The members find each other in a store
that source 0 serves at the address that it offers, and in which workers leave their digests.

The groups are kept between updates. They are made again after an update that failed, or if the
engines have changed.
"""

from __future__ import annotations

import datetime
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.errors import SyncError
from megatron_rl.process.interface import local_address
from megatron_rl.process.loopback import is_one_host, serve_store
from megatron_rl.sync.memory.segment import DIGEST_BYTES
from megatron_rl.sync.transports.transport import Bucket, Offer, Transfer

POLL_SECONDS = 0.0002
ENGINE_SHARE = 0.9  # of the timeout: an engine must answer before its caller gives it up


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The groups that all members have in common.

    Example: `Session(name="9f1c...", host="10.0.0.1", port=40123, backend="gloo", num_sources=2,
    num_workers=3, bucket_bytes=67108864, timeout_seconds=108.0)`.
    """

    name: str  # random
    host: str  # of source 0
    port: int  # of its store
    backend: str  # gloo or nccl
    num_sources: int
    num_workers: int  # of all engines
    bucket_bytes: int
    timeout_seconds: float  # of every wait

    @property
    def timeout(self) -> datetime.timedelta:
        """The timeout as torch takes it."""
        return datetime.timedelta(seconds=self.timeout_seconds)


class Group:
    """One source with all workers, seen from one of them.

    Args:
        rank: 0 for the source, 1 and up for the workers.

    Raises:
        SyncError: not all members have come within the timeout.
    """

    def __init__(
        self, session: Session, store: dist.Store, source: int, rank: int, device: torch.device
    ) -> None:
        self._session = session
        self._name = f"source {source} of the weights at {session.host}"
        size = 1 + session.num_workers
        prefixed = dist.PrefixStore(f"{session.name}/{source}", store)
        with _told(f"{self._name}: expected all {size} members of its group", session):
            self._backend = _backend(session, prefixed, rank, size, device)
        # The first collective connects NCCL's members, which waits without a timeout of its own.
        first = torch.zeros(1, device=device)
        self.broadcast(first, f"its first message to {size - 1} workers", is_first=True)

    def broadcast(self, tensor: torch.Tensor, what: str, *, is_first: bool = False) -> None:
        """From the source to all workers; returns when the tensor is there.

        Raises:
            SyncError: a member did not take part within the timeout, or has ended.
        """
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        expected = f"{self._name}: expected {what}"
        seconds = self._session.timeout_seconds
        with _told(expected, self._session):
            if is_first:
                work = _within(seconds, lambda: self._backend.broadcast([tensor], options))
            else:
                work = self._backend.broadcast([tensor], options)
            if self._session.backend == "nccl":  # its wait would only make the stream wait
                deadline = time.monotonic() + seconds
                while not work.is_completed():
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    time.sleep(POLL_SECONDS)
            work.wait()


class Sender:
    """A source's side."""

    has_many_sources = True
    needs_gpus = False
    is_free_after_send = True

    def __init__(self, *, source: int, num_sources: int, timeout_seconds: float) -> None:
        self._source, self._num_sources = source, num_sources
        self._timeout_seconds = timeout_seconds * ENGINE_SHARE
        self._device = _source_device()
        self._session: Session | None = None
        self._transfer: Transfer | None = None
        self._store: dist.Store | None = None
        self._group: Group | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._num_updates = 0
        self._is_whole = False  # the last update has come to its end

    def offer(self, transfer: Transfer) -> tuple[Offer, ...]:
        """Serve a store, unless the groups of the last update can be used again."""
        before = self._transfer
        is_same = before is not None and (
            (before.num_workers, before.hosts, before.bucket_bytes)
            == (transfer.num_workers, transfer.hosts, transfer.bucket_bytes)
        )
        is_kept = self._session is not None and self._is_whole and is_same
        if not is_kept:
            self.close()
            self._serve(transfer)
        assert self._session is not None
        self._transfer, self._is_whole = transfer, False
        self._num_updates += 1
        return tuple(
            {
                "session": asdict(self._session),
                "is_new": not is_kept,
                "update": self._num_updates,
                "num_tensors": transfer.num_tensors,
                "first_worker": sum(transfer.num_workers[:engine]),
            }
            for engine in range(len(transfer.num_workers))
        )

    def connect(self, offers: Sequence[Offer]) -> None:
        """Join the group of this source, unless this process is in it already."""
        session = Session(**offers[0]["session"])
        if self._group is not None and self._session == session:
            return
        if self._session != session:
            self.close()
            self._store = _store_of(session)
            self._session = session
        self._memory = torch.empty(session.bucket_bytes, dtype=torch.uint8, device=self._device)
        self._group = Group(session, self._store, self._source, 0, self._device)

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the bucket, [nbytes] uint8 on the learner's device."""
        return _view(self._memory, offset, nbytes)

    def send(self, bucket: Bucket) -> None:
        """Broadcast the bucket; returns when the workers of all engines have it."""
        if self._group is None:
            raise SyncError("collective: expected a connection, it is closed")
        self._group.broadcast(self._memory[: bucket.nbytes], f"workers for bucket {bucket.index}")

    def receipts(self) -> list[list[bytes]]:
        """The digests by worker and tensor, which the workers left in the store."""
        assert self._transfer is not None and self._session is not None
        receipts = []
        for worker in range(self._session.num_workers):
            key = _receipts_key(self._num_updates, worker)
            written = ""
            with _told("collective: expected the workers' digests in the store", self._session):
                if self._store.check([key]):
                    written = self._store.get(key).decode()
                    self._store.delete_key(key)
            digests = dict(entry.split(":") for entry in written.split())
            nothing = bytes(DIGEST_BYTES).hex()
            of_worker = (digests.get(str(i), nothing) for i in range(self._transfer.num_tensors))
            receipts.append([bytes.fromhex(digest) for digest in of_worker])
        self._is_whole = True
        return receipts

    def close(self) -> None:
        """Leave the group and, as source 0, end the store. May be called twice."""
        self._group = self._store = self._session = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _serve(self, transfer: Transfer) -> None:
        peers = list(transfer.hosts)
        if not is_one_host():
            peers.append(os.environ["MASTER_ADDR"])
        host = local_address(peers)
        timeout = datetime.timedelta(seconds=self._timeout_seconds)
        self._store = serve_store(0, timeout, host)
        self._session = Session(
            name=secrets.token_hex(8),
            host=host,
            port=self._store.port,
            backend="nccl" if self._device.type == "cuda" else "gloo",
            num_sources=self._num_sources,
            num_workers=sum(transfer.num_workers),
            bucket_bytes=transfer.bucket_bytes,
            timeout_seconds=self._timeout_seconds,
        )


class Receiver:
    """A worker's side."""

    def __init__(self, *, worker: int, device: torch.device) -> None:
        self._worker, self._device = worker, device
        self._session: Session | None = None
        self._store: dist.Store | None = None
        self._groups: list[Group] = []  # by source
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._offer: Offer = {}

    def connect(self, offer: Offer) -> None:
        """Join the groups of all sources, unless this worker is in them already.

        Raises:
            SyncError: a source did not come within the timeout, its device is of another type, or
                the groups are those of the last update and this worker is not in them.
        """
        session = Session(**offer["session"])
        self._offer = offer
        if self._session == session:
            return
        self.close()
        own = "nccl" if self._device.type == "cuda" else "gloo"
        if session.backend != own:
            raise SyncError(
                "sync.transport=collective: expected a learner and engines that are all on GPUs or "
                f"all on CPUs; the learner's tensors go over {session.backend}, worker "
                f"{self._worker} of the engine is on {self._device}; choose another sync.transport"
            )
        if not offer["is_new"]:
            raise SyncError(
                "collective: expected this engine in the groups of the last update, it is not; it "
                "was started again, or has taken another run's weights"
            )
        store = _store_of(session)
        rank = 1 + offer["first_worker"] + self._worker
        groups = [
            Group(session, store, source, rank, self._device)
            for source in range(session.num_sources)
        ]
        self._memory = torch.empty(session.bucket_bytes, dtype=torch.uint8, device=self._device)
        self._session, self._store, self._groups = session, store, groups

    def receive(self, bucket: Bucket) -> None:
        """Take part in the broadcast of the bucket's source."""
        if not 0 <= bucket.source < len(self._groups):
            raise SyncError(
                f"bucket {bucket.index}: expected one of {len(self._groups)} sources, got "
                f"{bucket.source}"
            )
        target = _view(self._memory, 0, bucket.nbytes)
        try:
            self._groups[bucket.source].broadcast(target, f"bucket {bucket.index} from it")
        except SyncError:
            self.close()  # bytes of this bucket may still come, and must not reach another one
            raise

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the bucket, [nbytes] uint8 on the worker's device."""
        return _view(self._memory, offset, nbytes)

    def acknowledge(self, digests: Mapping[int, bytes]) -> None:
        """Add the digests to this worker's receipts in the store."""
        num_tensors = self._offer["num_tensors"]
        for index in digests:
            if not 0 <= index < num_tensors:
                raise SyncError(f"receipt: expected one of {num_tensors} tensors, got {index}")
        key = _receipts_key(self._offer["update"], self._offer["first_worker"] + self._worker)
        text = "".join(f"{index}:{digest.hex()} " for index, digest in digests.items())
        if not text:
            return
        if self._session is None or self._store is None:
            raise SyncError("collective: expected a connection, it is closed")
        with _told("collective: expected the store of the sources", self._session):
            self._store.append(key, text)

    def close(self) -> None:
        """Leave all groups. May be called twice."""
        self._groups, self._store, self._session = [], None, None
        self._memory = torch.empty(0, dtype=torch.uint8)


def _source_device() -> torch.device:
    if torch.cuda.is_available() and dist.is_nccl_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _store_of(session: Session) -> dist.Store:
    with _told(f"source 0 of the weights: expected its store at {session.host}", session):
        return dist.TCPStore(
            session.host, session.port, timeout=session.timeout, wait_for_workers=False
        )


def _backend(
    session: Session, store: dist.Store, rank: int, size: int, device: torch.device
) -> Any:
    """The group's backend, on the interface by which source 0 is reached."""
    if session.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        # Its watchdog would end this process. The waits of this module end earlier.
        options._timeout = 10 * session.timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = session.timeout
    own = local_address([session.host])
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own)]
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, size, options)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call that knows no timeout; its thread is left behind if it takes longer."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    set_device = None if device is None else partial(torch.cuda.set_device, device)
    pool = ThreadPoolExecutor(1, thread_name_prefix="collective", initializer=set_device)
    try:
        return pool.submit(call).result(seconds)
    finally:
        pool.shutdown(wait=False)


class _told:
    """Turns an error of torch.distributed into a SyncError that begins with what was expected."""

    def __init__(self, expected: str, session: Session) -> None:
        self._expected, self._seconds = expected, session.timeout_seconds

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (RuntimeError, TimeoutError)) and not isinstance(error, SyncError):
            reason = (str(error).strip().splitlines() or ["no end of it"])[0]
            raise SyncError(
                f"{self._expected} within {self._seconds:g} s, got: {reason}"
            ) from error


def _view(memory: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    if offset < 0 or offset + nbytes > memory.numel():
        raise SyncError(
            f"bucket: expected bytes within {memory.numel()}, got {offset} to {offset + nbytes}"
        )
    return memory[offset : offset + nbytes]


def _receipts_key(update: int, worker: int) -> str:
    return f"receipts/{update}/{worker}"
