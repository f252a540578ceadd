"""Presets mean what they say: the table of docs/corrections.md lists them all with the keys they
set, and they hold in every file of configs/.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_rl.config import Config
from megatron_rl.config.presets import PRESETS, dotted

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "corrections.md"
CODE = re.compile(r"`([^`]+)`")


def section(heading: str) -> str:
    """The part of the page below a heading."""
    return PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows() -> dict[str, list[str]]:
    """The cells after the name, by preset."""
    lines = [line for line in section("Presets").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(each) == 4 for each in cells), cells
    return {each[0].strip("`"): each[1:] for each in cells}


def settings_in(text: str) -> dict[str, Any]:
    """The settings that a text names as `key: value`, as dotted names and values."""
    found = {}
    for code in CODE.findall(text):
        name, is_setting, value = code.partition(": ")
        if is_setting:
            is_whole = name.split(".")[0] in Config.__dataclass_fields__
            read = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
            found[name if is_whole else f"objective.{name}"] = read["value"]
    return found


def test_the_table_lists_every_preset():
    assert list(rows()) == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_names_the_keys_that_a_preset_sets(name):
    [common] = [text for text in section("Presets").split("\n\n") if text.startswith("Every pre")]
    _, sets, _ = rows()[name]
    listed = settings_in(common) | settings_in(sets)
    assert settings_in(sets), f"{name}: expected at least one key that differs from the common ones"
    assert listed | {"objective.preset": name} == dotted(PRESETS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_the_tests_of_the_table_exist(name):
    tests = CODE.findall(rows()[name][2])
    assert tests
    for each in tests:
        path, _, function = each.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, each
