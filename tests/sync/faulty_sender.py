"""The publisher's steps one by one, with a fault in one of them.

Called by test_publish.py; and, for a sender that dies, run as a process of its own:
python -m tests.sync.faulty_sender URL FOLDER FAULT, with the token in MEGATRON_RL_TOKEN.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.http import EngineControl
from megatron_rl.sync.transports.shared_memory import Sender
from megatron_rl.sync.transports.transport import Bucket, Transfer
from megatron_rl.sync.wire import (
    Manifest,
    bucket_to_json,
    manifest_to_json,
    new_checksum,
    plan_buckets,
)
from tests.sync.tiny_checkpoints import specs_of, tensors_of

BUCKET_BYTES = 2**18


def send(address: EngineAddress, folder: Path, fault: str) -> None:
    """`fault`: wrong checksum, torn bytes, early finish, skipped bucket, or killed."""
    tensors = tensors_of(folder)
    specs = specs_of(tensors)
    raw = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    sender = Sender(source=0, num_sources=1, timeout_seconds=20.0)
    (offer,) = sender.offer(
        Transfer(
            bucket_bytes=BUCKET_BYTES,
            num_tensors=len(specs),
            num_workers=(1,),
            hosts=("127.0.0.1",),
        )
    )
    control = EngineControl(address, 20.0)
    control.initialize({"transport": "shared_memory", "num_tensors": len(specs), "offer": offer})
    control.pause()
    control.start()
    manifest = Manifest(update="by hand", specs=tuple(specs))
    control.update("manifest", {"manifest": manifest_to_json(manifest)})
    for bucket in plan_buckets(specs, BUCKET_BYTES):
        checksums = _fill(sender, bucket, raw)
        if bucket.index == 2:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "early finish":
                control.finish(9)
            elif fault == "skipped bucket":
                continue
            elif fault == "torn bytes":
                sender.buffer(bucket.pieces[-1].bucket_offset, 1).add_(1)
            elif fault == "wrong checksum":
                checksums = dict.fromkeys(checksums, "0" * 32)
        control.update(f"bucket {bucket.index}", {"bucket": bucket_to_json(bucket, checksums)})


def _fill(sender: Sender, bucket: Bucket, raw: list[torch.Tensor]) -> dict[int, str]:
    checksums = {}
    for piece in bucket.pieces:
        end = piece.tensor_offset + piece.nbytes
        sender.buffer(piece.bucket_offset, piece.nbytes).copy_(
            raw[piece.tensor][piece.tensor_offset : end]
        )
        if end == raw[piece.tensor].numel():
            checksums[piece.tensor] = new_checksum(raw[piece.tensor].numpy()).hexdigest()
    return checksums


if __name__ == "__main__":
    engine = EngineAddress(url=sys.argv[1], token=os.environ["MEGATRON_RL_TOKEN"])
    send(engine, Path(sys.argv[2]), sys.argv[3])
