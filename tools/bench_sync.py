"""Measures a weight sync over process groups against a plain gloo broadcast of the same bytes.

    python tools/bench_sync.py --mib 64 --repeats 9

One source and one worker, in two processes of this host. A sync is a whole update: buckets,
checksums on both sides, the assembly of tensors, receipts. The engine's own loading is left out.
Both are timed in turn; the medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rl.config import SyncConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.process.loopback import HOST, serve_store
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.receive import UpdateReceiver
from megatron_rl.sync.source import WeightStream
from megatron_rl.sync.wire import TensorSpec

TIMEOUT = datetime.timedelta(seconds=60)
TENSOR_BYTES = 4 * 2**20  # of each tensor, as of a layer's matrix


class PipedEngine:
    """What `EngineControl` offers, with a worker at the other end of a pipe."""

    url = f"http://{HOST}:1"

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def world_size(self) -> int:
        """One worker."""
        return 1

    def is_paused(self) -> bool:
        """It serves nobody."""
        return False

    def initialize(self, values: dict[str, Any]) -> None:
        """Connect the worker."""
        self._call("connect", **values)

    def start(self) -> None:
        """Begin an update."""
        self._call("start")

    def update(self, phase: str, values: dict[str, Any]) -> None:
        """Send one message of an update."""
        self._call("update", **({"manifest": None, "bucket": None, "abandon": None} | values))

    def finish(self, version: int) -> None:
        """Complete the update."""
        self._call("complete")

    def abandon(self, reason: str) -> None:
        """The worker has told its error already."""

    def pause(self, **_options: Any) -> bool:
        """Nothing is in flight."""
        return True

    resume = reset_prefix_cache = close = pause

    def _call(self, name: str, **values: Any) -> None:
        self._pipe.send((name, values))
        answer = self._pipe.recv()
        if answer is not None:
            raise RuntimeError(answer)


def serve(pipe: Connection, specs: tuple[TensorSpec, ...], port: int) -> None:
    """The worker: takes the calls of `PipedEngine` and its part in plain broadcasts."""
    torch.set_num_threads(1)
    receiver = UpdateReceiver({s.name: s for s in specs}, worker=0, device=torch.device("cpu"))
    store = dist.TCPStore(HOST, port, timeout=TIMEOUT, wait_for_workers=False)
    group = dist.ProcessGroupGloo(store, 1, 2, TIMEOUT)
    target = torch.empty(sum(spec.nbytes for spec in specs), dtype=torch.uint8)
    while True:
        name, values = pipe.recv()
        if name == "end":
            return
        if name == "broadcast":
            broadcast(group, target)
        elif name == "update":
            receiver.update(**values, load=lambda tensors: [None for _ in tensors])
        else:
            getattr(receiver, name)(**values)
        pipe.send(None)


def broadcast(group: Any, tensor: torch.Tensor) -> None:
    """From rank 0 to the others."""
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def measure(mib: int, repeats: int, bucket_mib: float) -> Iterator[tuple[float, float]]:
    """The seconds of a sync and of a broadcast, in turn; the first pair is left out."""
    torch.set_num_threads(1)
    count = max(1, mib * 2**20 // TENSOR_BYTES)
    specs = tuple(
        TensorSpec(name=f"layers.{i}.weight", dtype=torch.float32, shape=(TENSOR_BYTES // 4,))
        for i in range(count)
    )
    tensors = [(spec.name, torch.randn(spec.shape)) for spec in specs]
    whole = torch.cat([tensor for _, tensor in tensors]).view(torch.uint8)
    store = serve_store(0, TIMEOUT)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    worker = context.Process(target=serve, args=(other, specs, store.port), daemon=True)
    worker.start()
    group = dist.ProcessGroupGloo(store, 0, 2, TIMEOUT)
    config = SyncConfig(transport="collective", bucket_mib=bucket_mib)
    address = EngineAddress(url=PipedEngine.url, token="unused")
    engine = PipedEngine(pipe)
    with Publisher([address], config, wire_dtype=None, control=lambda *_: engine) as publisher:
        for number in range(repeats + 1):
            begin = time.perf_counter()
            publisher.publish(WeightStream(specs=specs, tensors=tensors), version=number)
            middle = time.perf_counter()
            pipe.send(("broadcast", {}))
            broadcast(group, whole)
            pipe.recv()
            end = time.perf_counter()
            if number:
                yield middle - begin, end - middle
    pipe.send(("end", {}))
    worker.join()


def main(argv: list[str] | None = None) -> int:
    """Print the medians and the ratio of the speeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64, help="MiB of tensors")
    parser.add_argument("--bucket-mib", type=float, default=SyncConfig().bucket_mib)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args(argv)
    pairs = list(measure(arguments.mib, arguments.repeats, arguments.bucket_mib))
    sync, plain = (statistics.median(each) for each in zip(*pairs, strict=True))
    rate = arguments.mib / 1024
    print(f"sync       {1e3 * sync:8.1f} ms  {rate / sync:6.2f} GiB/s")
    print(f"broadcast  {1e3 * plain:8.1f} ms  {rate / plain:6.2f} GiB/s")
    print(f"ratio of the speeds: {plain / sync:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
