"""Runs a module on some ranks of this machine to its end, on ranks that `rank_server` forks.

    finished = run_module("megatron_rl.train", config, "loop.num_steps=3", ranks=2)

A start costs tenths of a second; torchrun and its ranks spend ten seconds on imports. Tests that
concern torchrun itself, or stop processes from outside, start the real one (`torchrun_command`).
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A run that takes longer hangs; a machine that others use as well may be given longer.
RUN_SECONDS = float(os.environ.get("MEGATRON_RL_TEST_RUN_SECONDS", "240"))


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """Example: FinishedRun(codes=(1, -15), stdout="DataError: ...")."""

    codes: tuple[int, ...]  # of each rank; minus the signal that ended it
    stdout: str  # of all ranks, with stderr

    @property
    def returncode(self) -> int:
        """Of the first rank that failed; 0 where none did."""
        return next((code for code in self.codes if code), 0)


def run_module(
    module: str,
    *arguments: object,
    ranks: int,
    must_succeed: bool = True,
    timeout: float = RUN_SECONDS,
    variables: Mapping[str, str] | None = None,
    kill_when: Path | None = None,
) -> FinishedRun:
    """`python -m module arguments` on so many ranks; 0: one process that knows of no ranks.

    Args:
        must_succeed: whether a rank that fails is an AssertionError, with the end of the output.
        timeout: seconds; then the ranks are killed.
        variables: added to the environment.
        kill_when: kill all ranks at once as soon as this path exists.

    Raises:
        AssertionError: still running after `timeout`, or something was left running.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        request = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "environment": rank_environment() | dict(variables or {}),
            "num_ranks": ranks,
            "log": str(log),
            "scratch": scratch,
            "seconds": timeout,
            "kill_when": str(kill_when or ""),
        }
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps(request), file=server.stdin, flush=True)
        line = server.stdout.readline()
        assert line, f"the server of ranks has ended with code {server.wait()}"
        answer = json.loads(line)
        stdout = log.read_text(errors="replace")
    assert not answer["is_late"], f"still running after {timeout:g} s:\n{stdout[-6000:]}"
    assert not answer["left"], f"left behind:\n{answer['left']}\n{stdout[-6000:]}"
    finished = FinishedRun(codes=tuple(answer["codes"]), stdout=stdout)
    if must_succeed:
        assert finished.returncode == 0, f"codes {finished.codes}\n{stdout[-6000:]}"
    return finished


def torchrun_command(module: str, *arguments: object, ranks: int) -> list[str]:
    """The real torchrun, as launch/torchrun.sh starts it on one node: the command line of `module`
    on so many ranks.
    """
    launcher = [sys.executable, "-m", "megatron_rl.process.agent"]
    return [*launcher, f"--nproc_per_node={ranks}", "-m", module, *map(str, arguments)]


def rank_environment() -> dict[str, str]:
    """One thread a rank, loopback, no warnings of libraries, and the repository's root to import
    tests from.
    """
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.rank_server"],
        cwd=ROOT,
        env=rank_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server
