"""How evaluation sets are shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_rl.observe.evaluations import (
    evaluation_label,
    evaluation_lines,
    evaluation_table,
    figures_of_sets,
)

METRICS = {
    "eval/avg_at_8": 0.55,
    "eval/pass_at_8": 0.9,
    "eval/reward/mean": 0.6,
    "eval/aime24/avg_at_32": 0.3125,
    "eval/aime24/pass_at_32": 0.6333,
    "eval/aime24/pass_at_8": 0.5,
    "eval/aime24/standard_error": 0.0612,
    "eval/aime24/truncation_rate/mean": 0.02,
    "eval/aime24/response_tokens/mean": 9412.4,
    "eval/minerva/avg_at_4": 0.4,
    "eval/minerva/pass_at_4": 0.5,
    "eval/fixed_gap/mean": 0.001,
    "reward/mean": 0.4,
}


def test_the_figures_of_each_set() -> None:
    sets = figures_of_sets(METRICS)
    assert list(sets) == ["", "aime24", "minerva"]
    assert sets["minerva"] == {"avg_at_4": 0.4, "pass_at_4": 0.5}
    assert sets[""]["avg_at_8"] == 0.55 and sets[""]["reward/mean"] == 0.6
    assert figures_of_sets({"eval/fixed_gap/mean": 0.1}) == {}


def test_a_line_for_each_named_set() -> None:
    assert [line.plain for line in evaluation_lines(METRICS)] == [
        "  eval aime24   avg@32 0.312 +- 0.061  pass@8 0.500  pass@32 0.633  cut 0.020  "
        "tokens 9,412",
        "  eval minerva  avg@4 0.400  pass@4 0.500",
    ]
    assert evaluation_lines({"eval/avg_at_8": 0.5}) == []


def test_the_table_has_a_row_for_each_set() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(evaluation_table(METRICS, title="runs/a"))
    text = console.file.getvalue()
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in text.splitlines()
        if line.startswith("│")
    ]
    assert "runs/a" in text
    assert rows == [
        ["held-out prompts", "avg@8 0.550", "", "pass@8 0.900", "", "", "", ""],
        ["aime24", "avg@32 0.312", "0.061", "pass@8 0.500", "", "0.020", "", "9,412"],
        ["", "", "", "pass@32 0.633", "", "", "", ""],
        ["minerva", "avg@4 0.400", "", "pass@4 0.500", "", "", "", ""],
    ]


def test_a_set_without_a_single_score_is_shown() -> None:
    """It has no avg@k, and no rate but these."""
    metrics = {"eval/aime24/failure_rate/mean": 1.0, "eval/aime24/truncation_rate/mean": 0.25}
    assert figures_of_sets(metrics).keys() == {"aime24"}
    assert [line.plain for line in evaluation_lines(metrics)] == ["  eval aime24  cut 0.250"]
    console = Console(file=io.StringIO(), width=120)
    console.print(evaluation_table(metrics, title="runs/a"))
    [row] = [line for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert row.replace("│", " ").split() == ["aime24", "0.250", "1.000"]


def test_labels() -> None:
    assert evaluation_label("eval/avg_at_8") == "avg@8"
    assert evaluation_label("eval/aime_at_24/pass_at_32") == "aime_at_24 pass@32"
    with pytest.raises(ValueError, match="expected the key of avg@k or pass@k"):
        evaluation_label("eval/aime24/reward/mean")
