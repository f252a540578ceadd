"""Memory that processes of one host share, and the workers' receipts in it.

It is an anonymous memory file (memfd), which another process opens as /proc/<pid>/fd/<n>.
Therefore it has no name in any file system, the kernel frees it when the last process that maps it
has ended (even by SIGKILL), it does not count against the size of /dev/shm (64 MB in a default
container), and only the same user can open it. Its size is sealed, because a sender that shrank it
would crash the engines that map it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_rl.errors import SyncError

DIGEST_BYTES = 16  # of a tensor's checksum


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


class Receipts:
    """A digest per worker and tensor, somewhere in a segment; zeros where there is none yet.

    Args:
        offset: of the first digest, in bytes.
        num_workers: of all engines.
    """

    def __init__(self, segment: Segment, offset: int, num_workers: int, num_tensors: int) -> None:
        self._segment, self._offset = segment, offset
        self._num_workers, self._num_tensors = num_workers, num_tensors

    @staticmethod
    def nbytes_of(num_workers: int, num_tensors: int) -> int:
        """The bytes that they take."""
        return num_workers * num_tensors * DIGEST_BYTES

    def clear(self) -> None:
        """Forget the receipts of the last update."""
        self._all().zero_()

    def write(self, worker: int, digests: Mapping[int, bytes]) -> None:
        """Write digests of one worker, by index into the manifest.

        Raises:
            SyncError: there is no such tensor.
        """
        for index, digest in digests.items():
            if not 0 <= index < self._num_tensors:
                raise SyncError(
                    f"receipt: expected one of {self._num_tensors} tensors, got {index}"
                )
            place = self._offset + (worker * self._num_tensors + index) * DIGEST_BYTES
            self._segment.bytes_of(place, DIGEST_BYTES).copy_(
                torch.frombuffer(bytearray(digest), dtype=torch.uint8)
            )

    def read(self) -> list[list[bytes]]:
        """The digests by worker and tensor."""
        written = self._all().view(self._num_workers, self._num_tensors, DIGEST_BYTES)
        return [[row.numpy().tobytes() for row in of_worker] for of_worker in written]

    def _all(self) -> torch.Tensor:
        nbytes = self.nbytes_of(self._num_workers, self._num_tensors)
        return self._segment.bytes_of(self._offset, nbytes)
