"""The transport over shared memory of one host: learner and engines map the same memory.

The memory holds one bucket, followed by the workers' receipts: a digest per worker and tensor. It
is an anonymous memory file (memfd), which an engine opens as /proc/<pid>/fd/<n>. Therefore it has
no name in any file system, the kernel frees it when the last process that maps it has ended (even
by SIGKILL), it does not count against the size of /dev/shm (64 MB in a default container), and only
the same user can open it. Its size is sealed, because a sender that shrank it would crash the
engines that map it.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.transports.transport import DIGEST_BYTES, Bucket, Offer, Transfer


class Sender:
    """The learner's side. It must be the only source, because it fills the whole bucket.

    Raises SyncError if the weights are distributed over several sources.
    """

    has_many_sources = False
    is_free_after_send = False

    def __init__(self, *, source: int, num_sources: int, timeout_seconds: float) -> None:
        if num_sources != 1:
            raise SyncError(
                "sync.transport=shared_memory: expected one process that sends all tensors, got "
                f"{num_sources}; choose another sync.transport"
            )
        self._segment: Segment | None = None
        self._transfer = Transfer(bucket_bytes=0, num_tensors=0, num_workers=(), hosts=())

    def offer(self, transfer: Transfer) -> tuple[Offer, ...]:
        """Allocate the memory, unless the memory of the last update is large enough."""
        self._transfer = transfer
        num_receipts = sum(transfer.num_workers) * transfer.num_tensors
        nbytes = transfer.bucket_bytes + num_receipts * DIGEST_BYTES
        if self._segment is None or self._segment.address.nbytes < nbytes:
            self.close()
            self._segment = Segment.create(nbytes)
        self._segment.bytes_of(transfer.bucket_bytes, num_receipts * DIGEST_BYTES).zero_()
        return tuple(
            {
                "segment": self._segment.address.to_json(),
                "bucket_bytes": transfer.bucket_bytes,
                "num_tensors": transfer.num_tensors,
                "first_worker": sum(transfer.num_workers[:engine]),
            }
            for engine in range(len(transfer.num_workers))
        )

    def connect(self, offers: Sequence[Offer]) -> None:
        """Does nothing, because the engines open the memory themselves."""

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the bucket, [nbytes] uint8 on the CPU."""
        return _bucket_view(self._segment, self._transfer.bucket_bytes, offset, nbytes)

    def send(self, bucket: Bucket) -> None:
        """Does nothing, because the engines map the memory that was written."""

    def receipts(self) -> list[list[bytes]]:
        """The digests by worker and tensor, which the workers wrote behind the bucket."""
        shape = (sum(self._transfer.num_workers), self._transfer.num_tensors, DIGEST_BYTES)
        written = self._segment.bytes_of(self._transfer.bucket_bytes, math.prod(shape))
        return [[row.numpy().tobytes() for row in of_worker] for of_worker in written.view(shape)]

    def close(self) -> None:
        """Release the memory. May be called twice."""
        if self._segment is not None:
            self._segment.close()
        self._segment = None


class Receiver:
    """A worker's side."""

    def __init__(self, *, worker: int, device: torch.device) -> None:
        self._worker = worker
        self._segment: Segment | None = None
        self._offer: Offer = {}

    def connect(self, offer: Offer) -> None:
        """Map the offered memory, unless it is already mapped."""
        address = SegmentAddress(**offer["segment"])
        if self._segment is None or self._segment.address != address:
            self.close()
            self._segment = Segment.open(address)
        self._offer = offer

    def receive(self, bucket: Bucket) -> None:
        """Returns at once: the bytes are in memory before the engine is informed of the bucket."""

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the bucket, [nbytes] uint8 on the CPU."""
        return _bucket_view(self._segment, self._offer["bucket_bytes"], offset, nbytes)

    def acknowledge(self, digests: Mapping[int, bytes]) -> None:
        """Write the digests into this worker's receipts."""
        num_tensors = self._offer["num_tensors"]
        first = (self._offer["first_worker"] + self._worker) * num_tensors
        for index, digest in digests.items():
            if not 0 <= index < num_tensors:
                raise SyncError(f"receipt: expected one of {num_tensors} tensors, got {index}")
            start = self._offer["bucket_bytes"] + (first + index) * DIGEST_BYTES
            self._segment.bytes_of(start, DIGEST_BYTES).copy_(
                torch.frombuffer(bytearray(digest), dtype=torch.uint8)
            )

    def close(self) -> None:
        """Unmap the memory. May be called twice."""
        if self._segment is not None:
            self._segment.close()
        self._segment = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentAddress:
    """The address under which a process on the same host can open the memory.

    Example: `SegmentAddress(pid=4711, fd=9, name="megatron_rl.5f0c...", nbytes=67108864)`.
    """

    pid: int
    fd: int
    name: str  # random, so that a reused process id is noticed
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return asdict(self)


class Segment:
    """A mapped memory file. The mapping exists as long as the segment or a view of it."""

    def __init__(self, fd: int, address: SegmentAddress) -> None:
        self._fd = fd
        self.address = address
        self._map = mmap.mmap(fd, address.nbytes)
        self._tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """Allocate `nbytes` of zeros. Raises OSError if the host does not have enough memory."""
        name = f"megatron_rl.{secrets.token_hex(8)}"
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, nbytes)  # an error now, not a SIGBUS in the engine later
            fcntl.fcntl(
                fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            return cls(fd, SegmentAddress(pid=os.getpid(), fd=fd, name=name, nbytes=nbytes))
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, address: SegmentAddress) -> Segment:
        """Map the memory that another process of the same user created on this host.

        Raises:
            SyncError: there is no such process or memory on this host, or it does not match the
                address.
        """
        path = f"/proc/{address.pid}/fd/{address.fd}"
        try:
            target = os.readlink(path)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SyncError(
                f"shared memory: expected process {address.pid} to hold it as {path}, "
                f"got: {error}; learner and engine must run on one host, as one user, in one "
                "process namespace"
            ) from error
        try:
            nbytes = os.fstat(fd).st_size
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS) if target.startswith("/memfd:") else 0
            if (
                not target.startswith(f"/memfd:{address.name}")
                or nbytes != address.nbytes
                or not seals & fcntl.F_SEAL_SHRINK
            ):
                raise SyncError(
                    f"shared memory: expected {address.name} of {address.nbytes} bytes at {path}, "
                    f"got {target} of {nbytes} bytes"
                )
            return cls(fd, address)
        except BaseException:
            os.close(fd)
            raise

    def bytes_of(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the memory, [nbytes] uint8. Raises SyncError if it is out of bounds."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.address.nbytes:
            raise SyncError(
                f"shared memory: expected bytes within {self.address.nbytes}, "
                f"got {offset} to {offset + nbytes}"
            )
        return self._tensor[offset : offset + nbytes]

    def close(self) -> None:
        """Close the descriptor; the memory is unmapped with its last view. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._tensor, self._map


def _bucket_view(
    segment: Segment | None, bucket_bytes: int, offset: int, nbytes: int
) -> torch.Tensor:
    """A view of bytes of the bucket; the receipts behind the bucket are out of bounds."""
    if segment is None:
        raise SyncError("shared memory: expected a connection, it is closed")
    if offset < 0 or offset + nbytes > bucket_bytes:
        raise SyncError(
            f"bucket: expected bytes within {bucket_bytes}, got {offset} to {offset + nbytes}"
        )
    return segment.bytes_of(offset, nbytes)
