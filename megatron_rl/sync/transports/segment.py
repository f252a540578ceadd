"""Memory that a learner and the engines on its host share: one bucket, and the engines' receipts
after it.

It is an anonymous memory file (memfd), reached by the engine as /proc/<pid>/fd/<n>. So it has no
name anywhere, the kernel frees it when the last process that maps it is gone (SIGKILL included), it
does not count against the size of /dev/shm (64 MB in a default container), and only the same user
can open it. Its size is sealed: an engine that maps it cannot be killed by a sender that shrinks
it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_rl.errors import SyncError


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentAddress:
    """Where a process on the same host finds the memory.

    Example: `SegmentAddress(pid=4711, fd=9, name="megatron_rl.5f0c...", nbytes=67108864)`.
    """

    pid: int
    fd: int
    name: str  # drawn at random: a process id that was used again is noticed
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Segment:
    """A mapped memory file; `bytes_of` gives views that live no longer than the mapping."""

    def __init__(self, fd: int, address: SegmentAddress) -> None:
        self._fd = fd
        self.address = address
        self._map = mmap.mmap(fd, address.nbytes)
        self._tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """Allocate `nbytes`, zeroed. Raises OSError when the host has no memory left for it."""
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
        """Map what another process of the same user created on this host.

        Raises:
            SyncError: there is no such process or memory here, or it is not what the address says.
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
        """View of the memory, [nbytes] uint8. Raises SyncError outside of it."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.address.nbytes:
            raise SyncError(
                f"shared memory: expected bytes within {self.address.nbytes}, "
                f"got {offset} to {offset + nbytes}"
            )
        return self._tensor[offset : offset + nbytes]

    def close(self) -> None:
        """Give the descriptor back; the memory goes when the last view of it does. Harmless
        twice.
        """
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._tensor, self._map
