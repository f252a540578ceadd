"""The counts of wrong decisions, on log-probs made by hand and on the recorded ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tools import probe_power
from tools.probe_power import GIVEN, SAMPLED, decide, read, table

DOCS = Path(__file__).parents[2] / "docs"
NUM_SEQUENCES, LENGTH = 48, 6


def write(path: Path, *, change: float, rounding: float, engine: str = "bfloat16") -> Path:
    """Two updates that change the learner's log-probs by `change`, up or down."""
    rng = np.random.default_rng(3)
    count = 2 * NUM_SEQUENCES * LENGTH
    x = change * rng.choice([-1.0, 1.0], count)
    noise = rounding * rng.standard_normal((3, count))
    before = np.full(count, -0.7)
    columns = {
        "learner_before": before,
        "engine_before": before + noise[0],
        "engine_again": before + noise[0],
        "learner_after": before + x,
        "engine_after": before + x + noise[1],
        "engine_sampled": before + noise[2],
        "learner_same": before,
        "learner_next": before + x,
    }
    places = np.arange(count) // LENGTH
    for first in (GIVEN[0], SAMPLED[0]):
        columns[f"{first}/update"] = places // NUM_SEQUENCES
        columns[f"{first}/sequence"] = places % NUM_SEQUENCES
    np.savez(path, engine=engine, learner="float32", **columns)
    return path


@pytest.mark.parametrize("rounding", [0.0, 0.01, 0.1])
def test_decisions_on_an_update_that_is_seen(rounding: float, tmp_path: Path) -> None:
    engine = "int4" if rounding else "float32"
    recorded = read(write(tmp_path / "a.npz", change=0.05, rounding=rounding, engine=engine))
    rng = np.random.default_rng(0)
    for is_stale in (False, True):
        found = [decide(recorded, is_stale=is_stale, rng=rng) for _ in range(20)]
        assert {each.is_stale for each in found} == {is_stale}
        assert {each.asked_again for each in found} == {is_stale}


def test_an_update_that_is_too_small_is_missed(tmp_path: Path) -> None:
    """The counts can also be of errors."""
    recorded = read(write(tmp_path / "a.npz", change=1e-5, rounding=0.0))
    assert not decide(recorded, is_stale=True, rng=np.random.default_rng(0)).is_stale


def test_the_table_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer decisions: the same updates, changes and gaps, no wrong decision."""
    monkeypatch.setattr(probe_power, "NUM_DECISIONS", 10)
    page = (DOCS / "parity-probe.md").read_text()
    for line in table(sorted(DOCS.glob("parity-probe-*.npz")))[2:]:
        cells = [cell.strip() for cell in line.split("|")]
        assert "| " + " | ".join(cells[1:6]) + " |" in page
        assert cells[6] == ("10" if cells[2] == "stale engine" else "0")
