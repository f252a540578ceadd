"""Runs a module on a few ranks, which are forked from a process that has imported the libraries.

    PYTHONPATH=$PWD python tools/warm_ranks.py < JOBS

A job is a line of JSON. Its answer, printed after all ranks have ended, is a line of JSON with
their exit codes. A small run spends most of its time importing torch; here every rank is forked
from a process that has already imported it. The rank then does the same as under `torchrun -m
MODULE ARGUMENTS`, including the import of the package, which must be the one in the current folder.
Megatron-Core is not imported in advance, because without CUDA the package must prepare its import.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

PRELOADED = (
    "torch._inductor.compile_fx",  # Megatron-Core's decorators import it
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "omegaconf",
    "rich.progress",
    "rich.table",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of a module. Example: `Job(module="megatron_rl.train", arguments=["run.yaml"],
    log="run.log", num_ranks=2, seconds=300)`.
    """

    module: str
    arguments: list[str]
    log: str  # file for the output of all ranks
    num_ranks: int
    seconds: float  # time limit, after which the ranks are killed


def run(job: Job) -> list[int | None]:
    """Run a job and return every rank's exit code. If a rank fails, or after the time limit, the
    other ranks are killed.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [
        context.Process(target=be_rank, args=(job, rank, port)) for rank in range(job.num_ranks)
    ]
    deadline = time.monotonic() + job.seconds
    for rank in ranks:
        rank.start()
    running = list(ranks)
    while running and wait([each.sentinel for each in running], deadline - time.monotonic()):
        for each in running:
            each.join(0)
        if any(each.exitcode for each in ranks):
            break
        running = [each for each in running if each.exitcode is None]
    for each in ranks:
        if each.exitcode is None:
            each.kill()
        each.join()
    return [each.exitcode for each in ranks]


def be_rank(job: Job, rank: int, port: int) -> None:
    """In the forked process: set up the environment like torchrun, and run the module as
    `__main__`.
    """
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.num_ranks),
        "LOCAL_WORLD_SIZE": str(job.num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    package = importlib.util.find_spec(job.module.split(".")[0])
    if package is None or not Path(package.origin).is_relative_to(Path.cwd()):
        raise SystemExit(f"{job.module}: expected it below {Path.cwd()}, got {package}")
    sys.argv = [job.module, *job.arguments]
    runpy.run_module(job.module, run_name="__main__", alter_sys=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    sys.path.pop(0)  # this file's folder, which `python -m` would not add
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # so that garbage collection in the ranks copies no pages
    for line in sys.stdin:
        print(json.dumps(run(Job(**json.loads(line)))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
