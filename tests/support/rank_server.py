"""`python -m tests.support.rank_server`: starts ranks by forking an interpreter that has imported
torch, Megatron and this package, so that a rank is there in tenths of a second, not in ten.

In: one JSON request a line on stdin (`tests/support/ranks.py` writes them). Out: one JSON answer a
line on the stdout that the server was started with. A request names a module, its arguments, its
whole environment, the number of ranks, the file that takes their output, a time limit and a path
(see `wait_for`); it is answered when the last rank and everything that it started have ended:

    {"module": "megatron_rl.train", "arguments": ["config.yaml"], "environment": {...},
     "num_ranks": 2, "log": "/tmp/log", "scratch": "/tmp/empty", "seconds": 240.0, "kill_when": ""}
    {"codes": [0, 0], "is_late": false, "left": []}

A rank sees what torchrun tells its ranks, and runs the module as `__main__` to the interpreter's
normal end. As with torchrun, the first failure ends the other ranks. `num_ranks` of 0 is one
process that knows of no ranks.

The server is a subreaper: what a rank leaves behind becomes its child. `left` are the command lines
of what is still there LEFT_SECONDS after the last rank; it is killed.

Ranks share the hash seed of the server, and torchrun itself is not there: the tests that stop,
kill and resume runs start the real torchrun (`ranks.torchrun_command`).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import transformers

from megatron_rl.learner.layout.cpu_device import run_on_cpu
from megatron_rl.process.lifetime import become_subreaper, die_with_parent
from tests.support.ports import free_ports
from tests.support.processes import children_of

LEFT_SECONDS = 10.0  # in which everything that a run started must be gone
TERM_SECONDS = 10.0  # of a rank that is told to end because another one failed
POLL_SECONDS = 0.02

# What ranks import, in the order of a real run: Megatron only after the CPU answers for CUDA.
BEFORE_MEGATRON = ("megatron_rl.train", "megatron_rl.sft")
MEGATRON = (
    "dist_checkpointing.strategies.torch",
    "distributed",
    "models.gpt.gpt_layer_specs",
    "optimizer",
    "optimizer_param_scheduler",
    "pipeline_parallel",
    "tensor_parallel",
)

Request = dict[str, Any]


def import_what_ranks_need() -> None:
    """Import it once, for every rank."""
    for name in BEFORE_MEGATRON:
        importlib.import_module(name)
    # The lazy modules of transformers import with the names that are taken from them.
    _ = transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast
    run_on_cpu()
    for name in MEGATRON:
        importlib.import_module(f"megatron.core.{name}")


def main() -> Request | None:
    """Serve until stdin ends; None then. In a rank that was forked: its request."""
    die_with_parent()
    become_subreaper()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    import_what_ranks_need()
    gc.collect()
    gc.freeze()  # else a rank's collector would copy every page of the imports
    ports = free_ports()
    while line := sys.stdin.readline():
        request: Request = json.loads(line)
        variables = rank_variables(request, next(ports))
        pids = []
        for of_rank in variables:
            pid = os.fork()
            if pid == 0:
                answers.close()
                become(request, of_rank)
                return request
            pids.append(pid)
        codes, is_late = wait_for(pids, request["seconds"], request["kill_when"])
        answer = {"codes": codes, "is_late": is_late, "left": end_what_is_left()}
        print(json.dumps(answer), file=answers, flush=True)
    return None


def rank_variables(request: Request, port: int) -> list[dict[str, str]]:
    """What torchrun adds to the environment of each rank, as far as this package reads it."""
    num_ranks = request["num_ranks"]
    if num_ranks == 0:
        return [{}]
    everybody = {
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
    }
    variables = []
    for rank in range(num_ranks):
        folder = Path(request["scratch"]) / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        own = {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_ERROR_FILE": folder / "error.json"}
        variables.append({name: str(value) for name, value in (everybody | own).items()})
    return variables


def become(request: Request, of_rank: dict[str, str]) -> None:
    """Make this forked process look as if it had been started for the request."""
    die_with_parent()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(request["environment"] | of_rank)
    tempfile.tempdir = None  # TMPDIR is read again


def run(request: Request) -> NoReturn:
    """Run the module of the request as `__main__`, and end as the interpreter would, but without
    freeing what was imported, which takes longer than many a run.
    """
    sys.argv = ["", *request["arguments"]]
    sys.modules.pop(request["module"], None)
    code: object = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        code = ending.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def wait_for(pids: list[int], seconds: float, kill_when: str) -> tuple[list[int], bool]:
    """Wait for the ranks, and end them: the others after a failure, all when the time is over or
    when the path `kill_when` exists.

    Returns:
        Their exit codes, minus the signal that ended one, and whether the time was over.
    """
    codes: dict[int, int] = {}
    deadline, is_late, has_failed = time.monotonic() + seconds, False, False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        living = [pid for pid in pids if pid not in codes]
        if not has_failed and any(codes.values()):
            has_failed = True
            send(signal.SIGTERM, living)
            deadline = min(deadline, time.monotonic() + TERM_SECONDS)
        if kill_when and os.path.exists(kill_when):
            send(signal.SIGKILL, living)
        if time.monotonic() > deadline:
            is_late = is_late or not has_failed
            send(signal.SIGKILL, living)
        time.sleep(POLL_SECONDS)
    return [codes[pid] for pid in pids], is_late


def send(signum: int, pids: list[int]) -> None:
    """A process of ours that has ended is a zombie until it is waited for, and takes any signal."""
    for pid in pids:
        os.kill(pid, signum)


def end_what_is_left() -> list[str]:
    """Wait for the children that ranks left to this subreaper, kill those that stay; their command
    lines.
    """
    deadline = time.monotonic() + LEFT_SECONDS
    left: list[str] = []
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return left
        if pid == 0 and time.monotonic() > deadline:
            for child in children_of(os.getpid()):
                line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                left.append(f"{child}: {line}")
                os.kill(child, signal.SIGKILL)
        time.sleep(POLL_SECONDS if pid == 0 else 0)


if __name__ == "__main__" and (request := main()) is not None:
    run(request)
