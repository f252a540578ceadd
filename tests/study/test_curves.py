"""The figures of a study's runs, as records and as the CSV of its report."""

from pathlib import Path

import pytest

from megatron_rl.errors import DataError
from megatron_rl.study.curves import read_csv, write_csv

RECORDS = [
    {"engine": "fp8", "arm": "grpo", "seed": 0, "step": 0, "eval/avg_at_8": 0.5},
    {"engine": "fp8", "arm": "grpo", "seed": 0, "step": 1, "reward/mean": 1 / 3, "other": 1.0},
    {"engine": "fp8", "arm": "grpo", "seed": 3, "step": 1, "reward/mean": None},
]


def test_a_csv_holds_the_figures_of_every_step_with_six_digits(tmp_path: Path) -> None:
    write_csv(RECORDS, tmp_path / "first.csv")
    curves = read_csv(tmp_path / "first.csv")
    assert list(curves) == [("fp8", "grpo", 0), ("fp8", "grpo", 3)]
    place = {"engine": "fp8", "arm": "grpo", "seed": 0}
    assert curves["fp8", "grpo", 0] == [
        place | {"step": 0, "eval/avg_at_8": 0.5},
        place | {"step": 1, "reward/mean": 0.333333},
    ]
    write_csv([each for run in curves.values() for each in run], tmp_path / "second.csv")
    assert (tmp_path / "second.csv").read_text() == (tmp_path / "first.csv").read_text()


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "engine,arm,seed,step,x\nfp8,grpo,0,1,much\n", None]
)
def test_what_is_no_csv_of_a_report(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "study.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=r"study\.csv: expected the CSV of a report"):
        read_csv(path)
