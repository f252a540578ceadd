"""Start a module's ranks as a user would, through torchrun, with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 240


def torchrun_command(module: str, *arguments: object, ranks: int) -> list[str]:
    """The command line of `module` on so many ranks of this machine, on a port of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={ranks}", "-m", module, *map(str, arguments)]


def torchrun_environment() -> dict[str, str]:
    """One thread a rank, loopback, and the repository's root to import tests from."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }


def run_module(
    module: str,
    *arguments: object,
    ranks: int,
    must_succeed: bool = True,
    timeout: float = TIMEOUT_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; an AssertionError with the end of its output where it failed."""
    finished = subprocess.run(
        torchrun_command(module, *arguments, ranks=ranks),
        cwd=ROOT,
        env=torchrun_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if must_succeed:
        assert finished.returncode == 0, finished.stdout[-6000:]
    return finished
