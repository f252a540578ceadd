"""avg@8 at equal samples and at equal seconds, from figures written here."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tools import study_ages

STUDY = """
config: c.yaml
settings: []
seeds: [0, 1]
engines: {age_0: [], age_1: []}
arms: {grpo: [], dc_grpo: []}
"""
MODELS = "models: {small: {config: c.yaml, settings: []}, large: {config: c.yaml, settings: []}}\n"


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Two seeds over 100 steps, of 1 s at age 0 and 0.5 s at age 1."""
    (tmp_path / "ages.yaml").write_text(STUDY)
    (tmp_path / "ages-study-seconds.csv").write_text("engine,seconds\nage_0,1\nage_1,0.5\n")
    with (tmp_path / "ages-study.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["engine", "arm", "seed", "step", "reward/mean", study_ages.AVERAGE])
        for engine in ("age_0", "age_1"):
            for seed in (0, 1):
                values = (0.2, "", 0.6 + 0.1 * seed)
                for step, value in zip((0, 50, 100), values, strict=True):
                    writer.writerow([engine, "grpo", seed, step, 0.5, value])
    return tmp_path


def test_equal_samples_and_equal_seconds(docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After 50 s, age 0 is halfway: 0.2 to 0.6 gives 0.4, 0.2 to 0.7 gives 0.45."""
    assert study_ages.main(["report", str(docs / "ages.yaml"), "--docs", str(docs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| engine | s a step | grpo, step 100 | grpo, 50 s |"
    assert lines[2] == "| age_0 | 1.00 | 0.65 ± 0.05 | 0.425 ± 0.02 |"
    assert lines[3] == "| age_1 | 0.50 | 0.65 ± 0.05 | 0.65 ± 0.05 |"
    assert len(lines) == 5
    assert (docs / "ages-study-ages.png").stat().st_size > 10_000


def test_a_file_of_several_models_is_refused(
    docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (docs / "ages.yaml").write_text(STUDY.replace("config: c.yaml\n", MODELS))
    for action in ("time", "report"):
        assert study_ages.main([action, str(docs / "ages.yaml")]) == 1
        assert "expected a study of one model, got 2 models" in capsys.readouterr().err
