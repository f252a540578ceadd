"""The two sides of a transport, which carries the bytes of an update from the learner into the
engines' workers.

A transport is a module of this folder that defines the classes `Sender` and `Receiver`; its name is
the value of `sync.transport`, and it is imported when it is first used. It carries buckets of bytes
in one direction and digests in the other. It knows nothing of vLLM, of HTTP, or of the names and
dtypes of tensors, and both sides run in processes of their own:

    source    a learner process that holds tensors of the model, with one Sender. Source 0 also
              drives the update over HTTP.
    worker    a process of an engine, with one Receiver. All workers receive all buckets.

The calls of one update; those on one line run at the same time, so that they may wait for each
other (a rendezvous, a broadcast):

    Sender.offer       source 0
    Sender.connect     all sources      Receiver.connect                        all workers
    for each bucket:
      Sender.buffer    the owners of the bucket's pieces write their bytes
      Sender.send      all sources      Receiver.receive, buffer, acknowledge   all workers
    Sender.receipts    source 0

So a source may own any part of the tensors, and what was written into a buffer is visible to the
workers only after `send`. Every wait of a transport ends with SyncError after `timeout_seconds`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_rl.config.choices import module_names
from megatron_rl.errors import SyncError
from megatron_rl.sync import transports

ALIGNMENT = 64  # bytes; a multiple of every element size, and a cache line
DIGEST_BYTES = 16
Offer = dict[str, Any]  # plain JSON: what one engine is told, in /init_weight_transfer_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A range of one tensor's bytes inside a bucket.

    Example: the second half of tensor 3, at the start of the bucket:
    `Piece(tensor=3, tensor_offset=65536, bucket_offset=0, nbytes=65536)`.
    """

    tensor: int  # index into the manifest
    tensor_offset: int  # bytes
    bucket_offset: int  # bytes, a multiple of ALIGNMENT
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What one call of `/update_weights` carries: at least one piece, in ascending offsets.

    Example: `Bucket(index=0, pieces=(Piece(...), Piece(...)))`.
    """

    index: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer that the bucket uses, gaps for alignment included."""
        last = self.pieces[-1]
        return last.bucket_offset + last.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The size of an update.

    Example: two engines of one worker each: `Transfer(bucket_bytes=67108864, num_tensors=146,
    num_workers=(1, 1))`.
    """

    bucket_bytes: int  # of the largest bucket
    num_tensors: int
    num_workers: tuple[int, ...]  # by engine


class Sender(Protocol):
    """A source's side of a transport. It outlives an update and is used by one thread at a time.

    Every method raises SyncError on failure.
    """

    def __init__(self, *, source: int, num_sources: int, timeout_seconds: float) -> None:
        """`source`: which of the `num_sources` this process is, from 0."""

    def offer(self, transfer: Transfer) -> tuple[Offer, ...]:
        """What each engine must know to connect, by engine. Called before every update, since an
        engine may have been restarted; a connection that still works may be offered again.
        """

    def connect(self, offers: Sequence[Offer]) -> None:
        """Connect to the workers of all engines, with the offers that source 0 made. What an
        earlier, broken update left unsent is dropped.
        """

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """Where a piece of the next bucket is written: [nbytes] uint8, on any device."""

    def send(self, bucket: Bucket) -> None:
        """Make a bucket visible to the workers. Every source calls it for every bucket, in order,
        whether it wrote a piece of it or not.
        """

    def receipts(self) -> list[list[bytes]]:
        """By worker of all engines in order, then by tensor: the digest of what the worker loaded,
        zeros where it acknowledged nothing.
        """

    def close(self) -> None:
        """Release everything. May be called twice."""


class Receiver(Protocol):
    """A worker's side of a transport.

    Every method raises SyncError on failure.
    """

    def __init__(self, *, worker: int, device: torch.device) -> None:
        """`worker`: the number of this worker in its engine, from 0; `device`: its model's."""

    def connect(self, offer: Offer) -> None:
        """Connect to the sources, with what `Sender.offer` gave for this engine; before every
        update.
        """

    def receive(self, bucket: Bucket) -> None:
        """Return when the bytes of the bucket can be read from `buffer`."""

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of the current bucket: [nbytes] uint8, on any device, valid until the next
        `receive`.
        """

    def acknowledge(self, digests: Mapping[int, bytes]) -> None:
        """Report the digests of the tensors that this bucket completed, by index into the manifest;
        once per bucket, after they were loaded.
        """

    def close(self) -> None:
        """Release everything. May be called twice."""


def transport_names() -> tuple[str, ...]:
    """The transports there are: the modules of this folder but this one."""
    return module_names(transports.__path__, support=("transport",))


def sender_class(name: str) -> type[Sender]:
    """The Sender of a transport; SyncError where there is no transport of this name."""
    return _module(name).Sender


def receiver_class(name: str) -> type[Receiver]:
    """The Receiver of a transport; SyncError where there is no transport of this name."""
    return _module(name).Receiver


def _module(name: str) -> Any:
    # The name comes from a request's body: nothing but what is in the folder is imported.
    if name not in transport_names():
        raise SyncError(
            f"sync.transport: expected one of {', '.join(transport_names())}, got {name!r}; "
            "learner and engine must run the same version of megatron_rl"
        )
    return importlib.import_module(f"{transports.__name__}.{name}")
