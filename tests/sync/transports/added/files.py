"""A second transport, in one file: buckets and receipts are files of a folder.

It differs from shared memory where the protocol allows it: there may be several sources; nothing is
visible before `send`; `receive` waits for the file of the bucket's source.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_rl.errors import SyncError
from megatron_rl.sync.memory.segment import DIGEST_BYTES
from megatron_rl.sync.transports.transport import Bucket, Offer, Transfer


class Sender:
    has_many_sources = True
    needs_gpus = False
    is_free_after_send = True

    def __init__(self, *, source: int, num_sources: int, timeout_seconds: float) -> None:
        self._source = source
        self._timeout_seconds = timeout_seconds
        self._folder: Path | None = None
        self._pieces: dict[str, torch.Tensor] = {}

    def offer(self, transfer: Transfer) -> tuple[Offer, ...]:
        self.close()
        self._transfer = transfer
        self._folder = Path(tempfile.mkdtemp(prefix="megatron_rl."))
        common = {
            "folder": str(self._folder),
            "timeout_seconds": self._timeout_seconds,
        }
        engines = range(len(transfer.num_workers))
        return tuple(common | {"first_worker": sum(transfer.num_workers[:i])} for i in engines)

    def connect(self, offers: Sequence[Offer]) -> None:
        self._folder = Path(offers[0]["folder"])
        self._pieces = {}

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        piece = self._pieces[str(offset)] = torch.zeros(nbytes, dtype=torch.uint8)
        return piece

    def send(self, bucket: Bucket) -> None:
        hidden = self._folder / f"hidden_{self._source}"
        save_file(self._pieces, hidden)
        hidden.rename(self._folder / f"bucket_{bucket.index}_{self._source}")
        self._pieces = {}

    def flush(self) -> None:
        pass

    def receipts(self) -> list[list[bytes]]:
        receipts = []
        for worker in range(sum(self._transfer.num_workers)):
            path = self._folder / f"receipts_{worker}"
            lines = path.read_text().splitlines() if path.exists() else []
            digests = {int(index): digest for line in lines for index, digest in json.loads(line)}
            nothing = "00" * DIGEST_BYTES
            of_worker = [digests.get(i, nothing) for i in range(self._transfer.num_tensors)]
            receipts.append([bytes.fromhex(digest) for digest in of_worker])
        return receipts

    def close(self) -> None:
        if self._folder is not None and self._source == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None


class Receiver:
    is_memory_kept = True

    def __init__(self, *, worker: int, device: torch.device) -> None:
        self._worker = worker
        self._memory = torch.empty(0)

    def connect(self, offer: Offer) -> None:
        self._offer = offer
        self._folder = Path(offer["folder"])

    def receive(self, bucket: Bucket) -> None:
        self._memory = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        deadline = time.monotonic() + self._offer["timeout_seconds"]
        path = self._folder / f"bucket_{bucket.index}_{bucket.source}"
        while not path.exists():
            if time.monotonic() > deadline:
                raise SyncError(
                    f"bucket {bucket.index}: expected it from source {bucket.source} within "
                    f"{self._offer['timeout_seconds']} s, got nothing"
                )
            time.sleep(0.005)
        for offset, piece in load_file(path).items():
            self._memory[int(offset) : int(offset) + len(piece)] = piece

    def buffer(self, offset: int, nbytes: int) -> torch.Tensor:
        return self._memory[offset : offset + nbytes]

    def acknowledge(self, digests: Mapping[int, bytes]) -> None:
        worker = self._offer["first_worker"] + self._worker
        with (self._folder / f"receipts_{worker}").open("a") as file:
            file.write(json.dumps([[i, digest.hex()] for i, digest in digests.items()]) + "\n")

    def close(self) -> None:
        self._memory = torch.empty(0)
