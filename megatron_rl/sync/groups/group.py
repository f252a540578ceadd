"""A process group of one source of the weights and all workers of all engines: NCCL if the tensors
are on GPUs, gloo if they are on CPUs.

The members find each other in a store that source 0 serves. Every wait ends with a SyncError at the
session's timeout.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.errors import SyncError
from megatron_rl.process.interface import local_address

POLL_SECONDS = 0.0002
# A bucket is broadcast in parts of this size, so that a worker checks one while the next arrives.
PART_BYTES = 8 * 2**20


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
        with told(f"{self._name}: expected all {size} members of its group", session):
            self._backend = _backend(session, prefixed, rank, size, device)
        # The first collective connects NCCL's members, which waits without a timeout of its own.
        first = torch.zeros(1, device=device)
        with told(f"{self._name}: expected its first message to {size - 1} workers", session):
            work = _within(session.timeout_seconds, lambda: self._broadcast(first))
            _wait(work, session)

    def begin(self, memory: torch.Tensor, what: str) -> Broadcast:
        """Begin to broadcast from the source to all workers, which all begin the same broadcasts in
        the same order. Each must be waited for.

        Args:
            memory: [n] uint8, n above 0; neither written nor, on a worker, read before its part has
                arrived.
            what: what this member expects, for errors.
        """
        with told(f"{self._name}: expected {what}", self._session):
            works = [self._broadcast(part) for part in memory.split(PART_BYTES)]
        return Broadcast(works, f"{self._name}: expected {what}", self._session)

    def _broadcast(self, tensor: torch.Tensor) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        return self._backend.broadcast([tensor], options)


class Broadcast:
    """A broadcast that has begun, in parts."""

    def __init__(self, works: list[dist.Work], expected: str, session: Session) -> None:
        self._works = works
        self._expected, self._session = expected, session
        self._num_done = 0

    def wait(self, nbytes: int | None = None) -> None:
        """Return when the first `nbytes` bytes are there; None: all of them.

        Raises:
            SyncError: a member did not take part within the timeout, or has ended.
        """
        count = len(self._works) if nbytes is None else math.ceil(nbytes / PART_BYTES)
        with told(self._expected, self._session):
            for work in self._works[self._num_done : count]:
                _wait(work, self._session)
                self._num_done += 1


def store_of(session: Session) -> dist.Store:
    """The store of source 0; raises SyncError if it is not reached within the timeout."""
    with told(f"source 0 of the weights: expected its store at {session.host}", session):
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
    options._threads = 2  # so that a part follows another without a pause
    return dist.ProcessGroupGloo(store, rank, size, options)


def _wait(work: dist.Work, session: Session) -> None:
    if session.backend == "nccl":  # its wait would only make the stream wait
        deadline = time.monotonic() + session.timeout_seconds
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(POLL_SECONDS)
    work.wait()


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call that knows no timeout; its thread is left behind if it takes longer."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    set_device = None if device is None else partial(torch.cuda.set_device, device)
    pool = ThreadPoolExecutor(1, thread_name_prefix="collective", initializer=set_device)
    try:
        return pool.submit(call).result(seconds)
    finally:
        pool.shutdown(wait=False)


class told:
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
