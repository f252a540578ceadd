"""The two sides of a transport, which carries the bytes of an update from the learner into the
engines' workers.

A transport is a module of this folder that defines the classes `Sender` and `Receiver`; its name is
the value of `sync.transport`, and it is imported when it is first used. It carries buckets of bytes
in one direction and digests in the other. It does not depend on vLLM, on HTTP, or on the names and
dtypes of tensors. Its two sides run in different processes:

    source    a learner process that sends tensors of the model, with one Sender. Source 0 also
              drives the update over HTTP. Each bucket belongs to one source, which fills it.
    worker    a process of an engine, with one Receiver. All workers receive all buckets.

An update consists of the following calls. Calls on the same line run at the same time, so that they
may wait for each other (a rendezvous, a broadcast):

    Sender.offer       source 0
    Sender.connect     all sources      Receiver.connect                        all workers
    for each bucket:
      Sender.buffer    the bucket's source writes its pieces
      Sender.send      that source      Receiver.receive, buffer, acknowledge   all workers
    Sender.flush       all sources
    Sender.receipts    source 0

A source may thus own any part of the tensors. Bytes written into a buffer are visible to the
workers only after `send`. A transport waits at most `timeout_seconds` and then raises SyncError.
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
Offer = dict[str, Any]  # plain JSON, sent to one engine in /init_weight_transfer_engine


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
    """The content of one call of `/update_weights`: at least one piece, in ascending offsets.

    Example: `Bucket(index=0, pieces=(Piece(...), Piece(...)), source=0)`.
    """

    index: int
    pieces: tuple[Piece, ...]
    source: int = 0  # that fills and sends it

    @property
    def nbytes(self) -> int:
        """The number of bytes that the bucket uses in the buffer, including gaps for alignment."""
        last = self.pieces[-1]
        return last.bucket_offset + last.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The size of an update.

    Example: two engines of one worker each: `Transfer(bucket_bytes=67108864, num_tensors=146,
    num_workers=(1, 1), hosts=("127.0.0.1", "10.0.0.7"))`.
    """

    bucket_bytes: int  # of the largest bucket
    num_tensors: int
    num_workers: tuple[int, ...]  # by engine
    hosts: tuple[str, ...]  # by engine: the host name or address in its URL


class Sender(Protocol):
    """A source's side of a transport. It is kept between updates and used by one thread at a time.

    Every method raises SyncError on failure.
    """

    has_many_sources: bool  # whether there may be more than one source
    needs_gpus: bool  # whether learner and engines must be on GPUs
    # whether `send` returns when the bytes are on their way, so that the source may then write its
    # next bucket while the workers load this one
    is_free_after_send: bool

    def __init__(self, *, source: int, num_sources: int, timeout_seconds: float) -> None:
        """`source`: the index of this process among the `num_sources` sources, from 0."""

    def offer(self, transfer: Transfer) -> tuple[Offer, ...]:
        """The information that each engine needs to connect, in the order of the engines. Called
        before every update, because an engine may have been restarted; an existing connection may
        be offered again.
        """

    def connect(self, offers: Sequence[Offer]) -> None:
        """Connect to the workers of all engines, with the offers that source 0 made. Discards any
        data that an earlier, failed update left unsent.
        """

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """The buffer for a piece of the next bucket: [nbytes] uint8, on any device."""

    def send(self, bucket: Bucket) -> None:
        """Make a bucket visible to the workers. Called by the bucket's source, for its buckets in
        order.
        """

    def flush(self) -> None:
        """Return when all buckets that this source sent can be read."""

    def receipts(self) -> list[list[bytes]]:
        """The digests of the tensors that each worker loaded: one list per worker, with the workers
        of all engines in order, and one digest per tensor. A digest is zeros if the worker did not
        acknowledge the tensor.
        """

    def close(self) -> None:
        """Release everything. May be called twice."""


class Receiver(Protocol):
    """A worker's side of a transport.

    Every method raises SyncError on failure.
    """

    # whether the next bucket leaves the bytes alone to which a tensor refers
    is_memory_kept: bool

    def __init__(self, *, worker: int, device: torch.device) -> None:
        """`worker`: the index of this worker in its engine, from 0; `device`: of its model."""

    def connect(self, offer: Offer) -> None:
        """Connect to the sources with the offer that `Sender.offer` made for this engine. Called
        before every update.
        """

    def receive(self, bucket: Bucket) -> None:
        """Begin to receive a bucket. Its bytes can be read from `buffer`."""

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of the current bucket, once they are there: [nbytes] uint8, on any device, valid
        until the next `receive`.
        """

    def acknowledge(self, digests: Mapping[int, bytes]) -> None:
        """Report the digests of the tensors that this bucket completed, by index into the manifest.
        Called once per bucket, after the tensors have been loaded.
        """

    def close(self) -> None:
        """Release everything. May be called twice."""


def transport_names() -> tuple[str, ...]:
    """The names of the available transports: all modules of this folder except this one."""
    return module_names(transports.__path__, support=("transport",))


def sender_class(name: str) -> type[Sender]:
    """The Sender of a transport; raises SyncError if there is no transport of this name."""
    return _module(name).Sender


def has_many_sources(name: str) -> bool:
    """Whether a transport may have many sources, so that each sends the tensors that it holds."""
    return sender_class(name).has_many_sources


def needs_gpus(name: str) -> bool:
    """Whether a transport carries only weights that are on a GPU."""
    return sender_class(name).needs_gpus


def receiver_class(name: str) -> type[Receiver]:
    """The Receiver of a transport; raises SyncError if there is no transport of this name."""
    return _module(name).Receiver


def _module(name: str) -> Any:
    # The name comes from the body of a request, so only modules of this folder may be imported.
    if name not in transport_names():
        raise SyncError(
            f"sync.transport: expected one of {', '.join(transport_names())}, got {name!r}; "
            "learner and engine must run the same version of megatron_rl"
        )
    return importlib.import_module(f"{transports.__name__}.{name}")
