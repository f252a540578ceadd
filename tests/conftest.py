"""What tests of several rooms share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 2 layers and hidden size 64 with a character tokenizer (vocabulary of 128)."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    options = "--hidden 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 32 --initializer-range 0.1"
    command = [sys.executable, str(TOOLS / "make_tiny_model.py"), str(folder), *options.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def recorded_rollouts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of `tiny_checkpoint` for several steps, made without an engine; see
    learner/recorded.py.
    """
    folder = tmp_path_factory.mktemp("recorded") / "rollouts"
    command = [sys.executable, "-W", "ignore", "-m", "tests.learner.recorded"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(tiny_checkpoint), str(folder)],
        check=True,
        cwd=TOOLS.parent,
        env=environment,
    )
    return folder
