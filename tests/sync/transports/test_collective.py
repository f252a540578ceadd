"""Process groups of sources and workers: learners of several layouts with a real vLLM server, and
single members that are missing.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.config import RolloutConfig
from megatron_rl.engine.server import start_engines
from megatron_rl.errors import SyncError
from megatron_rl.sync.groups import group
from megatron_rl.sync.transports.collective import Receiver, Sender
from megatron_rl.sync.transports.transport import Bucket, Piece, Transfer
from tests.support.models import write_sharp_model
from tests.support.processes import descendants_of
from tests.support.ranks import run_module
from tests.sync.collective_ranks import FAULTY_SECONDS, scores_of

TRANSFER = Transfer(bucket_bytes=128, num_tensors=1, num_workers=(1,), hosts=("127.0.0.1",))
BUCKET = Bucket(
    index=0, pieces=(Piece(tensor=0, tensor_offset=0, bucket_offset=0, nbytes=64),), source=0
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the ranks found, by layout, and the scores of the engine as it was loaded."""
    folder = tmp_path_factory.mktemp("collective")
    return publish_from(folder, {4: ["2x2"], 2: ["2x1", "1x2", "faults"]}, tensor_parallel=1)


def publish_from(
    folder: Path, layouts: dict[int, list[str]], *, tensor_parallel: int
) -> dict[str, Any]:
    """Publish from learners in layouts, by number of ranks, to an engine of so many workers."""
    write_sharp_model(folder / "a")
    write_changed_model(folder / "a", folder / "b")
    config = RolloutConfig(
        dtype="float32",
        kv_cache_gib=0.1,
        num_threads=1,
        max_num_seqs=16,
        tensor_parallel=tensor_parallel,
    )
    (engine,) = start_engines(
        config,
        model_path=str(folder / "a"),
        log_dir=folder,
        token="a-token-for-this-test",
        seed=0,
        update_timeout_seconds=20.0,
    )
    with engine:
        engine.wait_ready()
        found = {"loaded": scores_of(engine.address)}
        [server] = [pid for pid in descendants_of(engine.pid) if is_server(pid)]
        named = {"url": engine.address.url, "token": engine.address.token, "pid": server}
        (folder / "engine.json").write_text(json.dumps(named))
        for num_ranks, of_ranks in layouts.items():
            run_module("tests.sync.collective_ranks", folder, *of_ranks, ranks=num_ranks)
            found |= json.loads((folder / f"{num_ranks}.json").read_text())
    return found


def is_server(pid: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return "vllm.entrypoints" in command and "megatron_rl.process.guard" not in command


def write_changed_model(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for tensor in tensors.values():
        tensor.mul_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["2x1", "1x2", "2x2"])
def test_an_updated_engine_equals_a_freshly_loaded_one(found: dict[str, Any], layout: str) -> None:
    """Twice in a row, with other weights in between."""
    scores = found[layout]
    assert scores["a2"] == scores["a4"] == found["loaded"]
    assert scores["b1"] == scores["b3"]
    assert max(abs(a - b) for a, b in zip(scores["a2"], scores["b1"], strict=True)) > 0.1


@pytest.mark.slow
def test_every_worker_of_an_engine_is_updated(tmp_path: Path) -> None:
    found = publish_from(tmp_path, {2: ["2x1", "1x2"]}, tensor_parallel=2)
    for layout in ("2x1", "1x2"):
        scores = found[layout]
        assert scores["a2"] == scores["a4"] == found["loaded"]
        assert scores["b1"] == scores["b3"] != scores["a2"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("silent source", r"bucket .*status 200, got .*source 1 of the weights"),
        ("wrong checksum", "expected checksum 0000"),
    ],
)
def test_a_fault_poisons_the_engine(found: dict[str, Any], fault: str, message: str) -> None:
    case = found["faults"][fault]
    assert re.search(message, case["error"]), case["error"]
    assert case["seconds"] < 3 * FAULTY_SECONDS
    assert "weights_poisoned" in case["served"]


def test_a_whole_update_mends_it(found: dict[str, Any]) -> None:
    for name in ("mended", "mended again"):
        case = found["faults"][name]
        assert case["error"] == "" and case["served"] == found["loaded"]


def test_a_dead_engine_is_told(found: dict[str, Any]) -> None:
    case = found["faults"]["dead engine"]
    assert "bucket" in case["error"]
    assert case["seconds"] < 3 * FAULTY_SECONDS


def test_a_worker_that_does_not_come_is_told() -> None:
    sender = Sender(source=0, num_sources=1, timeout_seconds=1.0)
    offers = sender.offer(TRANSFER)
    begin = time.monotonic()
    with pytest.raises(SyncError, match=r"source 0 .*: expected all 2 members .* within 0\.9 s"):
        sender.connect(offers)
    assert time.monotonic() - begin < 5.0
    sender.close()


def test_a_worker_that_was_not_there_in_the_last_update_is_refused() -> None:
    """An engine was started again: nobody waits for it in the groups that exist."""
    sender = Sender(source=0, num_sources=1, timeout_seconds=2.0)
    (offer,) = offers = sender.offer(TRANSFER)
    first = Receiver(worker=0, device=CPU)
    thread = threading.Thread(target=first.connect, args=(offer,))
    thread.start()
    sender.connect(offers)
    thread.join()
    sender.receipts()
    (again,) = sender.offer(TRANSFER)
    assert again["session"] == offer["session"]
    with pytest.raises(SyncError, match="started again"):
        Receiver(worker=0, device=CPU).connect(again)
    # The next offer makes new groups, because this update did not end.
    assert sender.offer(TRANSFER)[0]["session"] != offer["session"]
    sender.close()
    first.close()


def connected(timeout_seconds: float) -> tuple[Sender, Receiver]:
    sender = Sender(source=0, num_sources=1, timeout_seconds=timeout_seconds)
    (offer,) = offers = sender.offer(TRANSFER)
    worker = Receiver(worker=0, device=CPU)
    thread = threading.Thread(target=sender.connect, args=(offers,))
    thread.start()
    worker.connect(offer)
    thread.join()
    return sender, worker


def test_the_next_bucket_is_written_while_one_is_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In parts; and the tensors of a bucket stay as they are when the next one arrives."""
    monkeypatch.setattr(group, "PART_BYTES", 24)
    sender, worker = connected(10.0)
    received = []
    for index in range(4):
        sender.buffer(0, 64).copy_(torch.arange(64, dtype=torch.uint8) + index)
        sender.send(replace(BUCKET, index=index))
        sender.buffer(0, 64).fill_(99)
        worker.receive(replace(BUCKET, index=index))
        received.append(torch.cat([worker.buffer(0, 8), worker.buffer(8, 56)]))
        received.append(worker.buffer(0, 64))
    sender.flush()
    for index, tensor in enumerate(received):
        assert tensor.tolist() == list(range(index // 2, 64 + index // 2))
    sender.close()
    worker.close()


def test_a_silent_source_is_told_to_the_worker() -> None:
    sender, worker = connected(1.0)
    worker.receive(BUCKET)
    with pytest.raises(SyncError, match=r"source 0 .*: expected bucket 0 from it within 0\.9 s"):
        worker.buffer(0, 64)
    with pytest.raises(SyncError, match="one of 0 sources"):
        worker.receive(BUCKET)
    sender.close()
    worker.close()


def test_a_learner_on_gpus_and_an_engine_on_a_cpu_are_refused() -> None:
    sender = Sender(source=0, num_sources=1, timeout_seconds=1.0)
    (offer,) = sender.offer(TRANSFER)
    offer["session"]["backend"] = "nccl"
    with pytest.raises(SyncError, match="all on GPUs or all on CPUs"):
        Receiver(worker=0, device=CPU).connect(offer)
    sender.close()
