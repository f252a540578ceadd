"""The transport over process groups, to engines on any host: NCCL if the tensors are on GPUs, gloo
if they are on CPUs.

Every source has a group of its own, with itself as rank 0 and all workers of all engines after it,
in which it broadcasts its buckets. So no tensor passes through another source, and a source's link
carries each byte about once, however many engines there are. The members find each other in a store
that source 0 serves at the address that it offers, and in which workers leave their digests.

Nobody waits for the whole of a bucket but the engine that loads it: a source writes its next bucket
into other memory while the first one is on its way, and a worker reads the beginning of a bucket
while its end arrives.

The groups are kept between updates. They are made again after an update that failed, or if the
engines have changed.
"""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist

from megatron_rl.errors import SyncError
from megatron_rl.process.interface import local_address
from megatron_rl.process.loopback import is_one_host, serve_store
from megatron_rl.sync.groups.group import Broadcast, Group, Session, store_of, told
from megatron_rl.sync.memory.reused import ReusedMemory
from megatron_rl.sync.memory.segment import DIGEST_BYTES
from megatron_rl.sync.transports.transport import Bucket, Offer, Transfer

ENGINE_SHARE = 0.9  # of the timeout: an engine must answer before its caller gives it up


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
        self._memory = torch.empty(0, dtype=torch.uint8)  # of the next bucket
        self._sent: tuple[torch.Tensor, Broadcast] | None = None  # the bucket before it
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
            self._store = store_of(session)
            self._session = session
        self._memory = self._new_memory(session)
        self._group = Group(session, self._store, self._source, 0, self._device)

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the next bucket, [nbytes] uint8 on the learner's device."""
        return _view(self._memory, offset, nbytes)

    def send(self, bucket: Bucket) -> None:
        """Begin to broadcast the bucket, once the workers of all engines have the one before."""
        if self._group is None or self._session is None:
            raise SyncError("collective: expected a connection, it is closed")
        following = self._sent[0] if self._sent else self._new_memory(self._session)
        self.flush()
        view = self._memory[: bucket.nbytes]
        broadcast = self._group.begin(view, f"workers for bucket {bucket.index}")
        self._sent, self._memory = (self._memory, broadcast), following

    def flush(self) -> None:
        """Return when the workers of all engines have what was sent."""
        if self._sent is not None:
            self._sent[1].wait()

    def receipts(self) -> list[list[bytes]]:
        """The digests by worker and tensor, which the workers left in the store."""
        assert self._transfer is not None and self._session is not None
        self.flush()
        receipts = []
        for worker in range(self._session.num_workers):
            key = _receipts_key(self._num_updates, worker)
            written = ""
            with told("collective: expected the workers' digests in the store", self._session):
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
        self._group = self._store = self._session = self._sent = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _new_memory(self, session: Session) -> torch.Tensor:
        return torch.empty(session.bucket_bytes, dtype=torch.uint8, device=self._device)

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

    is_memory_kept = True

    def __init__(self, *, worker: int, device: torch.device) -> None:
        self._worker, self._device = worker, device
        self._session: Session | None = None
        self._store: dist.Store | None = None
        self._groups: list[Group] = []  # by source
        self._memories = ReusedMemory(0, device)
        self._memory = torch.empty(0, dtype=torch.uint8)  # of the current bucket
        self._arriving: Broadcast | None = None
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
        store = store_of(session)
        rank = 1 + offer["first_worker"] + self._worker
        groups = [
            Group(session, store, source, rank, self._device)
            for source in range(session.num_sources)
        ]
        self._memories = ReusedMemory(session.bucket_bytes, self._device)
        self._session, self._store, self._groups = session, store, groups

    def receive(self, bucket: Bucket) -> None:
        """Begin to take part in the broadcast of the bucket's source."""
        if not 0 <= bucket.source < len(self._groups):
            raise SyncError(
                f"bucket {bucket.index}: expected one of {len(self._groups)} sources, got "
                f"{bucket.source}"
            )
        self._arriving, self._memory = None, torch.empty(0, dtype=torch.uint8)  # may be taken again
        self._memory = self._memories.take()
        target = _view(self._memory, 0, bucket.nbytes)
        self._arriving = self._groups[bucket.source].begin(target, f"bucket {bucket.index} from it")

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the bucket, [nbytes] uint8 on the worker's device, as soon as it is there.

        Raises:
            SyncError: it did not arrive within the timeout, or the source has ended.
        """
        view = _view(self._memory, offset, nbytes)
        if self._arriving is None:
            raise SyncError("collective: expected a bucket before its bytes are read")
        try:
            self._arriving.wait(offset + nbytes)
        except SyncError:
            self.close()  # bytes of this bucket may still come, and must not reach another one
            raise
        return view

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
        with told("collective: expected the store of the sources", self._session):
            self._store.append(key, text)

    def close(self) -> None:
        """Leave all groups. May be called twice."""
        self._groups, self._store, self._session, self._arriving = [], None, None, None
        self._memories = ReusedMemory(0, self._device)
        self._memory = torch.empty(0, dtype=torch.uint8)


def _source_device() -> torch.device:
    if torch.cuda.is_available() and dist.is_nccl_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _view(memory: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    if offset < 0 or offset + nbytes > memory.numel():
        raise SyncError(
            f"bucket: expected bytes within {memory.numel()}, got {offset} to {offset + nbytes}"
        )
    return memory[offset : offset + nbytes]


def _receipts_key(update: int, worker: int) -> str:
    return f"receipts/{update}/{worker}"
