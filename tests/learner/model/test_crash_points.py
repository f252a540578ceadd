"""A process that is ended, or a disk that fails, at any operation on a checkpoint's files leaves
the old checkpoint or the new one, whole (tests/learner/support/crash_while_saving.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import ROOT, rank_environment

SOURCE = ROOT / "tests/support/crash_points.c"
NUM_KINDS = 15  # scenarios times modes


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that ends a process at its n-th operation."""
    path = tmp_path_factory.mktemp("crash") / "crash_points.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", path, SOURCE, "-ldl"], check=True)
    return path


def crash(library: Path, model: Path, folder: Path, *, num_points: str, seconds: float) -> str:
    """What the crashes left, a line for each scenario and mode."""
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "tests.learner.support.crash_while_saving"),
            *map(str, (model, folder, library)),
            *([num_points] if num_points else []),
        ],
        cwd=ROOT,
        env=rank_environment() | {"LD_PRELOAD": os.fspath(library)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    return finished.stdout


def num_points_in(output: str) -> int:
    """The number of crash points of all lines."""
    found = re.findall(r"(\d+) operations, (\d+) points, \d+ old, \d+ new", output)
    assert len(found) == NUM_KINDS, output
    assert all(int(operations) > 20 for operations, _ in found)
    return sum(int(points) for _, points in found)


def test_a_crash_leaves_the_old_or_the_new_checkpoint(
    library: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = crash(library, tiny_checkpoint, tmp_path, num_points="1", seconds=240)
    assert num_points_in(output) == NUM_KINDS


@pytest.mark.slow
def test_so_do_two_hundred_crashes(library: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """About five minutes; all operations, by the command of crash_while_saving.py, an hour."""
    output = crash(library, tiny_checkpoint, tmp_path, num_points="16", seconds=3_600)
    print(output)
    assert num_points_in(output) >= 200
