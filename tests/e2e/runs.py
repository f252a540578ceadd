"""Training runs for the tests of this folder: to their end, or started for real, as a user starts
them, to be stopped on the way and to find every process of theirs.

A started run is known by the variable RUN_VARIABLE in its environment, which all its processes
inherit. A process that overwrote its environment (vLLM renames itself) is found as a descendant
instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from megatron_rl.process.guard import ENGINE_CORE
from tests.support.processes import descendants_of, is_alive, parent_of
from tests.support.ranks import ROOT, RUN_SECONDS, run_module, torchrun_command
from tests.support.served_engine import ServedEngine

RUN_VARIABLE = "MEGATRON_RL_TEST_RUN"
POLL_SECONDS = 0.005


class TrainingProcess:
    """A run of `megatron_rl.train` that was started; `output` grows while it runs.

    Args:
        arguments: CONFIG and overrides.
        num_ranks: below torchrun; 0: one process without torchrun.
        run_dir: holds the output as `console_<n>.log`, n the number of the start.
        variables: added to the environment.
        launcher_options: of torchrun.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        num_ranks: int,
        run_dir: Path,
        variables: dict[str, str],
        launcher_options: Sequence[str] = (),
    ) -> None:
        self._identity = uuid.uuid4().hex
        run_dir.mkdir(parents=True, exist_ok=True)
        number = len(list(run_dir.glob("console_*.log")))
        self._log = run_dir / f"console_{number}.log"
        command = [sys.executable, "-m", "megatron_rl.train", *arguments]
        if num_ranks:
            command = torchrun_command("megatron_rl.train", *arguments, ranks=num_ranks)
            place = command.index("-m", command.index("-m") + 1)
            command[place:place] = launcher_options
        environment = os.environ | {RUN_VARIABLE: self._identity, "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._seen: dict[int, str] = {}

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def pid_of(self, role: str) -> int:
        """Of "torchrun", "rank 0", "rank 1", "server" (vLLM's API server), "engine core" (its
        process of the model), "guard"."""
        if role == "torchrun":
            return self.process.pid
        if not role.startswith("rank "):
            self.wait_until(lambda: any(_is_role(pid, role) for pid in self.pids()))
        pids = self.pids()
        if role.startswith("rank "):
            # Its own children, the checkpoint's writers among them, look like the rank.
            variable = f"\0RANK={role.removeprefix('rank ')}\0"
            ranks = [pid for pid in pids if parent_of(pid) == self.process.pid]
            [pid] = [pid for pid in ranks if variable in f"\0{_environment(pid)}"]
        else:
            [pid] = [pid for pid in pids if _is_role(pid, role)]
        return pid

    def pids(self) -> list[int]:
        """Every living process of the run; what was seen in an earlier call counts until it
        ended.
        """
        marked = [pid for pid in psutil.pids() if self._identity in _environment(pid)]
        for pid in {*marked, *descendants_of(self.process.pid)}:
            self._seen[pid] = _start_time(pid)
        # A pid that the kernel gave to another process has another start time.
        return [p for p, began in self._seen.items() if is_alive(p) and _start_time(p) == began]

    def wait(self, seconds: float = RUN_SECONDS) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None

    def wait_until(self, happened: Callable[[], bool], seconds: float = RUN_SECONDS) -> None:
        """Returns a moment after something has happened; a run that ended before it is a
        failure.
        """
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"the run ended:\n{self.output}"
            assert time.monotonic() < deadline, f"waited {seconds} s:\n{self.output}"
            time.sleep(POLL_SECONDS)

    def left_after(self, seconds: float) -> list[str]:
        """What is still alive of the run after so long, or at once if nothing is."""
        deadline = time.monotonic() + seconds
        while (pids := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [f"{pid}: {_command_line(pid)}" for pid in pids]

    def kill_all(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def training(
    config: Path,
    *overrides: str,
    num_ranks: int,
    run_dir: Path,
    variables: Mapping[str, str] | None = None,
) -> Iterator[TrainingProcess]:
    """A started run; nothing of it is left behind, however the test ends."""
    run = TrainingProcess(
        [str(config), f"run_dir={run_dir}", *overrides],
        num_ranks=num_ranks,
        run_dir=run_dir,
        variables=dict(variables or {}),
    )
    try:
        yield run
    finally:
        run.kill_all()


def train_to_the_end(
    config: Path,
    *overrides: str,
    num_ranks: int,
    run_dir: Path,
    engine: ServedEngine | None = None,
) -> str:
    """Train until all steps are done and every process has ended; the output.

    Args:
        num_ranks: 0: one process that knows of no ranks.
        engine: that the run is given; None: it starts its own, or replays.
    """
    given = engine.overrides() if engine else []
    return run_module(
        "megatron_rl.train",
        config,
        f"run_dir={run_dir}",
        *given,
        *overrides,
        ranks=num_ranks,
        variables=engine.variables() if engine else None,
    ).stdout


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _is_role(pid: int, role: str) -> bool:
    command = _command_line(pid)
    if role == "guard":
        return "-m megatron_rl.process.guard" in command
    if role == "engine core":
        return command.startswith(ENGINE_CORE)
    assert role == "server", role
    return "vllm.entrypoints" in command and "megatron_rl.process.guard" not in command


def _environment(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return ""


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    return ""


def _start_time(pid: int) -> str:
    """Field 22 of /proc/<pid>/stat; "" where there is no such process."""
    if parent_of(pid) < 0:
        return ""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat[stat.rindex(")") + 2 :].split()[19]
    return ""
