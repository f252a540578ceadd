"""docs/paper.md: every function and setting that its tables name exists, and takes the value that
is given.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from megatron_rl.config.file import load_config
from megatron_rl.config.presets import PRESETS, dotted
from megatron_rl.config.schema import check, hint_at, list_knobs
from tests.support.pages import CODE, headings, section, settings_in, table

PAGE = "paper.md"
ALGORITHM, RUNS = "DC-GRPO: Alg. 1 and Eqs. 3 to 11", "The runs"
CONFIG = Path(__file__).parents[1] / "configs" / "dapo.yaml"
ROWS = [row for heading in headings(PAGE) for row in table(section(PAGE, heading))]
KEY = re.compile(r"[a-z_]+(\.[a-z_]+(\[\])?)+")


def names_in(row: list[str]) -> list[str]:
    """The names of the package and of settings in a row, without the settings' values."""
    codes = [code.partition(": ")[0] for cell in row for code in CODE.findall(cell)]
    return [code for code in codes if code.startswith("megatron_rl.") or KEY.fullmatch(code)]


def values_of(heading: str) -> dict[str, object]:
    """The settings of a section's tables with their values, without what is taken otherwise."""
    rows = table(section(PAGE, heading))
    return settings_in(" ".join(cell for row in rows for cell in row[:3]))


def find(name: str) -> object:
    """The function, class or method of a dotted name."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for part in parts[depth:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_the_page_covers_the_algorithm_the_runs_and_the_appendix():
    assert len(ROWS) >= 20
    # What the preset sets is all there, and as the preset sets it.
    said = values_of(ALGORITHM)
    preset = dotted(PRESETS["dc_grpo"])
    constraint = {key for key in preset if key.startswith("objective.constraint.")}
    for key in {"objective.normalize", "objective.clip_low", "objective.clip_high", *constraint}:
        assert said[key] == preset[key], key


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_the_functions_of_a_row_exist(row):
    functions = CODE.findall(row[1])
    assert functions
    for name in functions:
        assert callable(find(name)), name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_the_settings_of_a_row_exist_and_take_their_values(row):
    knobs = list_knobs()
    for name in names_in(row):
        assert name.startswith("megatron_rl.") or name in knobs, name
    for cell in row:
        for code in CODE.findall(cell):
            for name, value in settings_in(f"`{code}`").items():
                keys = tuple(name.split("."))
                check(hint_at(keys, None, PAGE), value, keys, PAGE)
                assert name != "objective.preset" or value in PRESETS


def test_the_shipped_run_has_the_values_of_the_page():
    settings = dotted(dataclasses.asdict(load_config(CONFIG)))
    said = values_of(ALGORITHM) | values_of(RUNS)
    assert said.pop("rollout.quantization.format") == "fp8"  # a run of its own
    assert len(said) > 25
    for key, value in said.items():
        held = settings[key]
        assert (list(held) if isinstance(held, tuple) else held) == value, key
