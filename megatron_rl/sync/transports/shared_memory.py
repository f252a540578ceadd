"""The transport over shared memory of one host: learner and engines map the same memory
(`sync/memory/segment.py`), which holds one bucket, followed by the workers' receipts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.memory.segment import Receipts, Segment, SegmentAddress
from megatron_rl.sync.transports.transport import Bucket, Offer, Transfer


class Sender:
    """The learner's side. It must be the only source, because it fills the whole bucket.

    Raises SyncError if the weights are distributed over several sources.
    """

    has_many_sources = False
    needs_gpus = False
    is_free_after_send = False

    def __init__(self, *, source: int, num_sources: int, timeout_seconds: float) -> None:
        if num_sources != 1:
            raise SyncError(
                "sync.transport=shared_memory: expected one process that sends all tensors, got "
                f"{num_sources}; choose another sync.transport"
            )
        self._segment: Segment | None = None
        self._receipts: Receipts | None = None
        self._bucket_bytes = 0

    def offer(self, transfer: Transfer) -> tuple[Offer, ...]:
        """Allocate the memory, unless the memory of the last update is large enough."""
        num_workers, self._bucket_bytes = sum(transfer.num_workers), transfer.bucket_bytes
        nbytes = transfer.bucket_bytes + Receipts.nbytes_of(num_workers, transfer.num_tensors)
        if self._segment is None or self._segment.address.nbytes < nbytes:
            self.close()
            self._segment = Segment.create(nbytes)
        self._receipts = Receipts(
            self._segment, transfer.bucket_bytes, num_workers, transfer.num_tensors
        )
        self._receipts.clear()
        return tuple(
            {
                "segment": self._segment.address.to_json(),
                "bucket_bytes": transfer.bucket_bytes,
                "num_tensors": transfer.num_tensors,
                "num_workers": num_workers,
                "first_worker": sum(transfer.num_workers[:engine]),
            }
            for engine in range(len(transfer.num_workers))
        )

    def connect(self, offers: Sequence[Offer]) -> None:
        """Does nothing, because the engines open the memory themselves."""

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the bucket, [nbytes] uint8 on the CPU."""
        return _bucket_view(self._segment, self._bucket_bytes, offset, nbytes)

    def send(self, bucket: Bucket) -> None:
        """Does nothing, because the engines map the memory that was written."""

    def flush(self) -> None:
        """Does nothing, for the same reason."""

    def receipts(self) -> list[list[bytes]]:
        """The digests by worker and tensor, which the workers wrote behind the bucket."""
        assert self._receipts is not None
        return self._receipts.read()

    def close(self) -> None:
        """Release the memory. May be called twice."""
        if self._segment is not None:
            self._segment.close()
        self._segment = self._receipts = None


class Receiver:
    """A worker's side."""

    is_memory_kept = False

    def __init__(self, *, worker: int, device: torch.device) -> None:
        self._worker = worker
        self._segment: Segment | None = None
        self._receipts: Receipts | None = None
        self._offer: Offer = {}

    def connect(self, offer: Offer) -> None:
        """Map the offered memory, unless it is already mapped."""
        address = SegmentAddress(**offer["segment"])
        if self._segment is None or self._segment.address != address:
            self.close()
            self._segment = Segment.open(address)
        self._receipts = Receipts(
            self._segment, offer["bucket_bytes"], offer["num_workers"], offer["num_tensors"]
        )
        self._offer = offer

    def receive(self, bucket: Bucket) -> None:
        """Returns at once: the bytes are in memory before the engine is informed of the bucket."""

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the bucket, [nbytes] uint8 on the CPU."""
        return _bucket_view(self._segment, self._offer["bucket_bytes"], offset, nbytes)

    def acknowledge(self, digests: Mapping[int, bytes]) -> None:
        """Write the digests into this worker's receipts."""
        if self._receipts is None:
            raise SyncError("shared memory: expected a connection, it is closed")
        self._receipts.write(self._offer["first_worker"] + self._worker, digests)

    def close(self) -> None:
        """Unmap the memory. May be called twice."""
        if self._segment is not None:
            self._segment.close()
        self._segment = self._receipts = None


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
