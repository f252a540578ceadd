"""`python -m tests.sync.collective_ranks FOLDER LAYOUT ...` on ranks: learners in several layouts
publish through sync/transports/collective.py to the engine that FOLDER/engine.json names, which was
loaded from the checkpoint FOLDER/a. Rank 0 writes what it found to FOLDER/WORLD.json.

LAYOUT is TENSORxPIPELINE. In each, the weights of FOLDER/b and of FOLDER/a are published in turn,
twice. "faults" in the place of a layout: updates of which a part goes wrong, by a learner of two
stages; then the engine is killed in the middle of an update.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist

from megatron_rl.config import ModelConfig, OptimizerConfig, ParallelConfig, SyncConfig
from megatron_rl.engine.address import GENERATE_ROUTE, EngineAddress
from megatron_rl.engine.answers import score_body
from megatron_rl.errors import SyncError
from megatron_rl.learner.layout.parallel import (
    Parallel,
    initialize_parallel,
    shut_down_parallel,
)
from megatron_rl.learner.learner import Learner
from megatron_rl.sync.contribute import Contributor
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.source import WeightStream
from megatron_rl.sync.sources import Sources
from megatron_rl.sync.wire import TensorSpec
from megatron_rl.weights.geometry import read_geometry

TEXT = torch.randint(3, 128, (90,), generator=torch.Generator().manual_seed(0)).tolist()
# Buckets of 16 KiB: the embedding is divided, and every source has several.
SYNC = SyncConfig(transport="collective", bucket_mib=16 / 1024, timeout_seconds=20.0)
FAULTY_SECONDS = 3.0


def scores_of(address: EngineAddress) -> list[float] | str:
    """The engine's log-probs of TEXT; or its refusal."""
    response = httpx.post(
        address.url + GENERATE_ROUTE,
        json=score_body(TEXT),
        headers={"Authorization": f"Bearer {address.token}"},
        timeout=30.0,
    )
    if response.status_code != httpx.codes.OK:
        return response.text
    entries = response.json()["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for token, entry in zip(TEXT[1:], entries, strict=True)]


class Link:
    """What a rank publishes with: a publisher, a contributor, or nothing."""

    def __init__(self, parallel: Parallel, address: EngineAddress, sync: SyncConfig) -> None:
        self.publisher: Publisher | None = None
        self.contributor: Contributor | None = None
        if parallel.is_weight_source:
            group = parallel.host.pp if parallel.pp_size > 1 else None
            sources = Sources(group)
            if parallel.rank == 0:
                self.publisher = Publisher([address], sync, wire_dtype=None, sources=sources)
            else:
                self.contributor = Contributor(sync, sources=sources, wire_dtype=None)

    def publish(self, learner: Learner, version: int) -> str:
        """The error, if there was one."""
        tensors = learner.owned_tensors()
        stream = WeightStream(
            specs=tuple(
                TensorSpec(name=name, dtype=torch.float32, shape=shape)
                for name, shape in learner.tensor_shapes()
            ),
            tensors=tensors,
            sources=tuple(learner.tensor_stages()),
        )
        try:
            if self.publisher is not None:
                self.publisher.publish(stream, version=version)
            elif self.contributor is not None:
                self.contributor.contribute(stream)
        except SyncError as error:
            return str(error)
        finally:
            for _ in tensors:  # a source that gave up, for the other TP ranks of its stage
                pass
        return ""


def learner_of(folder: Path, parallel: Parallel) -> Learner:
    model = ModelConfig(path=str(folder))
    geometry = read_geometry(folder)
    return Learner(model, OptimizerConfig(), geometry, parallel, num_updates=1)


def try_layout(folder: Path, address: EngineAddress, layout: str) -> Any:
    tensor, pipeline = map(int, layout.split("x"))
    config = ParallelConfig(tensor=tensor, pipeline=pipeline, timeout_seconds=60)
    parallel = initialize_parallel(config, seed=1)
    link = Link(parallel, address, SYNC)
    found = {}
    learners = {name: learner_of(folder / name, parallel) for name in "ab"}
    for version, name in enumerate("baba", start=1):
        error = link.publish(learners[name], version)
        assert not error, error
        parallel.barrier()
        if parallel.rank == 0:
            found[f"{name}{version}"] = scores_of(address)
    end_layout()
    return found


def end_layout() -> None:
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()


def try_faults(folder: Path, address: EngineAddress, engine_pid: int) -> dict[str, Any]:
    """What rank 0 is told, how long it took, and what the engine then answers, by fault. Every case
    has groups of its own, as a run that is resumed has.
    """
    sync = SyncConfig(transport="collective", bucket_mib=16 / 1024, timeout_seconds=FAULTY_SECONDS)
    found: dict[str, Any] = {}
    for name in ("silent source", "mended", "wrong checksum", "mended again", "dead engine"):
        layout = ParallelConfig(pipeline=2, timeout_seconds=60)
        parallel = initialize_parallel(layout, seed=1)
        link = Link(parallel, address, sync)
        learner = learner_of(folder / "a", parallel)
        if link.contributor is not None:
            spoil(link.contributor, name, engine_pid)
        begin = time.monotonic()
        error = link.publish(learner, 9)
        seconds = time.monotonic() - begin
        parallel.barrier()
        if parallel.rank == 0:
            served = "" if name == "dead engine" else scores_of(address)
            found[name] = {"error": error, "seconds": seconds, "served": served}
        end_layout()
    return found


def spoil(contributor: Contributor, fault: str, engine_pid: int) -> None:
    """Make the second source do what the fault says."""
    send, give = contributor._sender.send, contributor._sources.give
    sent = []

    def send_and_kill(bucket: Any) -> None:
        if len(sent) == 1:
            os.kill(engine_pid, signal.SIGKILL)
        sent.append(bucket)
        send(bucket)

    def give_wrongly(checksums: dict[int, str], what: str) -> None:
        give(dict.fromkeys(checksums, "0" * 32), what)

    if fault == "silent source":
        contributor._sender.send = lambda bucket: None
    elif fault == "wrong checksum":
        contributor._sources.give = give_wrongly
    elif fault == "dead engine":
        contributor._sender.send = send_and_kill


def main(folder: Path, layouts: list[str]) -> None:
    named = json.loads((folder / "engine.json").read_text())
    address = EngineAddress(url=named["url"], token=named["token"])
    found = {}
    for layout in layouts:
        if layout == "faults":
            found[layout] = try_faults(folder, address, named["pid"])
        else:
            found[layout] = try_layout(folder, address, layout)
    if dist.get_rank() == 0:
        path = folder / f"{dist.get_world_size()}.json"
        path.write_text(json.dumps(found))
    shut_down_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
