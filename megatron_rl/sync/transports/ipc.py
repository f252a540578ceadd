"""The transport over CUDA IPC: engines read the learner's bucket from its GPU, on the same GPU or
over NVLink, and nothing passes through the memory of the host but the checksums' copy.

The handle of the bucket is plain bytes, sent as hexadecimal JSON; nothing is pickled. Beside it,
learner and engines share a small segment of the host's memory (`sync/memory/segment.py`): the
number of buckets that were sent, and the workers' receipts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.memory.device import HANDLE_BYTES, DeviceMemory, MappedMemory
from megatron_rl.sync.memory.segment import Receipts, Segment, SegmentAddress
from megatron_rl.sync.transports.transport import ALIGNMENT, Bucket, Offer, Transfer

DEVICE_TYPE = "cuda"  # whose memory has handles
COUNT_BYTES = 8  # at the start of the segment: how many buckets were sent
POLL_SECONDS = 0.0002
ENGINE_SHARE = 0.9  # of the timeout: an engine must answer before its caller gives it up


class Sender:
    """The learner's side. It must be the only source, because it fills the whole bucket.

    Raises SyncError if the weights are distributed over several sources, or are not on a GPU.
    """

    has_many_sources = False
    needs_gpus = True
    is_free_after_send = False

    def __init__(self, *, source: int, num_sources: int, timeout_seconds: float) -> None:
        if num_sources != 1:
            raise SyncError(
                "sync.transport=ipc: expected one process that sends all tensors, got "
                f"{num_sources}; choose another sync.transport"
            )
        self._timeout_seconds = timeout_seconds * ENGINE_SHARE
        self._memory: DeviceMemory | None = None
        self._segment: Segment | None = None
        self._receipts: Receipts | None = None
        self._bucket_bytes = 0

    def offer(self, transfer: Transfer) -> tuple[Offer, ...]:
        """Allocate the bucket on the GPU, unless that of the last update has the same size."""
        num_workers = sum(transfer.num_workers)
        nbytes = ALIGNMENT + Receipts.nbytes_of(num_workers, transfer.num_tensors)
        is_same = self._bucket_bytes == transfer.bucket_bytes
        if self._segment is None or not is_same or self._segment.address.nbytes < nbytes:
            self.close()
            self._memory = DeviceMemory(transfer.bucket_bytes, _source_device())
            self._segment = Segment.create(nbytes)
            self._bucket_bytes = transfer.bucket_bytes
        assert self._memory is not None
        self._receipts = Receipts(self._segment, ALIGNMENT, num_workers, transfer.num_tensors)
        self._receipts.clear()
        _set_count(self._segment, 0)
        return tuple(
            {
                "handle": self._memory.handle.hex(),
                "segment": self._segment.address.to_json(),
                "bucket_bytes": transfer.bucket_bytes,
                "num_tensors": transfer.num_tensors,
                "num_workers": num_workers,
                "first_worker": sum(transfer.num_workers[:engine]),
                "timeout_seconds": self._timeout_seconds,
            }
            for engine in range(len(transfer.num_workers))
        )

    def connect(self, offers: Sequence[Offer]) -> None:
        """Does nothing, because the engines map the memory themselves."""

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the bucket, [nbytes] uint8 on the learner's GPU."""
        if self._memory is None:
            raise SyncError("CUDA IPC: expected a connection, it is closed")
        return _view(self._memory.tensor, offset, nbytes)

    def send(self, bucket: Bucket) -> None:
        """Say that the bucket can be read, once it was written."""
        if self._memory is None or self._segment is None:
            raise SyncError("CUDA IPC: expected a connection, it is closed")
        self._memory.flush()
        _set_count(self._segment, bucket.index + 1)

    def flush(self) -> None:
        """Does nothing, because `send` returns when the bucket can be read."""

    def receipts(self) -> list[list[bytes]]:
        """The digests by worker and tensor."""
        assert self._receipts is not None
        return self._receipts.read()

    def close(self) -> None:
        """Release all memory. May be called twice."""
        for memory in (self._memory, self._segment):
            if memory is not None:
                memory.close()
        self._memory = self._segment = self._receipts = None


class Receiver:
    """A worker's side."""

    is_memory_kept = False

    def __init__(self, *, worker: int, device: torch.device) -> None:
        self._worker, self._device = worker, device
        self._offer: Offer = {}
        self._mapped: MappedMemory | None = None
        self._segment: Segment | None = None
        self._receipts: Receipts | None = None
        self._own = torch.empty(0, dtype=torch.uint8)  # the bucket, on this worker's device

    def connect(self, offer: Offer) -> None:
        """Map the offered memory, unless it is already mapped.

        Raises:
            SyncError: this worker is not on a GPU, the offer is not one of this transport, or its
                memory cannot be reached.
        """
        if self._device.type != DEVICE_TYPE:
            raise SyncError(
                f"sync.transport=ipc: expected engines on GPUs, worker {self._worker} is on "
                f"{self._device}; choose another sync.transport"
            )
        handle, address = parse_handle(offer["handle"]), SegmentAddress(**offer["segment"])
        if self._segment is None or self._segment.address != address:
            self.close()
            segment = Segment.open(address)
            try:
                self._mapped = MappedMemory(handle, self._device)
            except BaseException:
                segment.close()
                raise
            self._segment = segment
            self._own = torch.empty(offer["bucket_bytes"], dtype=torch.uint8, device=self._device)
        self._receipts = Receipts(
            self._segment, ALIGNMENT, offer["num_workers"], offer["num_tensors"]
        )
        self._offer = offer

    def receive(self, bucket: Bucket) -> None:
        """Wait until the bucket was sent, and copy it to this worker's GPU."""
        if self._segment is None or self._mapped is None:
            raise SyncError("CUDA IPC: expected a connection, it is closed")
        seconds = self._offer["timeout_seconds"]
        deadline = time.monotonic() + seconds
        while _count(self._segment) != bucket.index + 1:
            if time.monotonic() > deadline:
                raise SyncError(
                    f"CUDA IPC: expected bucket {bucket.index} from the learner within "
                    f"{seconds:.3g} s, got {_count(self._segment)} buckets"
                )
            time.sleep(POLL_SECONDS)
        self._mapped.read(_view(self._own, 0, bucket.nbytes))

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        """A view of the bucket, [nbytes] uint8 on the worker's GPU."""
        if self._mapped is None:
            raise SyncError("CUDA IPC: expected a connection, it is closed")
        return _view(self._own, offset, nbytes)

    def acknowledge(self, digests: Mapping[int, bytes]) -> None:
        """Write the digests into this worker's receipts."""
        if self._receipts is None:
            raise SyncError("CUDA IPC: expected a connection, it is closed")
        self._receipts.write(self._offer["first_worker"] + self._worker, digests)

    def close(self) -> None:
        """Unmap all memory. May be called twice."""
        for memory in (self._mapped, self._segment):
            if memory is not None:
                memory.close()
        self._mapped = self._segment = self._receipts = None
        self._own = torch.empty(0, dtype=torch.uint8)


def parse_handle(text: object) -> bytes:
    """The bytes of a handle from its hexadecimal form; raises SyncError for anything else."""
    try:
        handle = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        handle = b""
    if len(handle) != HANDLE_BYTES:
        raise SyncError(
            f"CUDA IPC: expected a handle of {HANDLE_BYTES} bytes in hexadecimal, got {text!r:.40}"
        )
    return handle


def _source_device() -> torch.device:
    if not torch.cuda.is_available():
        raise SyncError(
            "sync.transport=ipc: expected a learner on a GPU, got one on the CPU; choose another "
            "sync.transport"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _view(memory: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    if offset < 0 or nbytes < 0 or offset + nbytes > memory.numel():
        raise SyncError(
            f"bucket: expected bytes within {memory.numel()}, got {offset} to {offset + nbytes}"
        )
    return memory[offset : offset + nbytes]


def _count(segment: Segment) -> int:
    return int(segment.bytes_of(0, COUNT_BYTES).view(torch.int64))


def _set_count(segment: Segment, count: int) -> None:
    segment.bytes_of(0, COUNT_BYTES).view(torch.int64).fill_(count)
