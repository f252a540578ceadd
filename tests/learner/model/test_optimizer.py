"""The learning rate of every step of a run, worked by hand, and what weight decay takes hold of."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.learner.schedule_rank import LEARNING_RATE, NUM_UPDATES
from tests.torchrun import ROOT, torchrun_environment


@pytest.fixture(scope="module")
def found(tiny_checkpoint: Path) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-m", "tests.learner.schedule_rank", str(tiny_checkpoint)],
        cwd=ROOT,
        env=torchrun_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


# Steps count from 1. A warm-up's first step has a rate; a decay reaches 0 one past the last step.
FACTORS = {
    "constant_0": [1.0] * 8,
    "constant_3": [1 / 3, 2 / 3, *[1.0] * 6],
    "linear_0": [1 - step / 9 for step in range(1, 9)],
    "linear_3": [1 / 3, 2 / 3, 1.0, *[1 - step / 6 for step in range(1, 6)]],
    "cosine_0": [(1 + math.cos(math.pi * step / 9)) / 2 for step in range(1, 9)],
    "cosine_3": [1 / 3, 2 / 3, *[(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]],
}


@pytest.mark.parametrize("name", list(FACTORS))
def test_learning_rate_of_every_step(name: str, found: dict[str, Any]) -> None:
    rates = found[name]["rates"]
    assert len(rates) == NUM_UPDATES
    for of_groups, factor in zip(rates, FACTORS[name], strict=True):
        assert of_groups == pytest.approx([LEARNING_RATE * factor] * len(of_groups))
        assert of_groups[0] > 0


def test_matrices_decay_and_norms_do_not(found: dict[str, Any]) -> None:
    assert sorted(found["constant_0"]["decays"]) == [[0.0, [1]], [0.1, [2]]]
