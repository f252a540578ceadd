"""Reads the tables of the pages in docs/, which tests hold against the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

DOCS = Path(__file__).parents[2] / "docs"
CODE = re.compile(r"`([^`]+)`")


def section(page: str, heading: str) -> str:
    """The part of a page of docs/ below a heading of the second level."""
    return (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]


def headings(page: str) -> list[str]:
    """The headings of the second level."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("## ") for line in lines if line.startswith("## ")]


def table(text: str) -> list[list[str]]:
    """The rows of the table in a text, without its two lines of headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line[1:].rstrip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {len(rows[0])}, rows
    return rows[2:]


def settings_in(text: str) -> dict[str, Any]:
    """The settings that a text names in the form `key: value`; a value is read as YAML."""
    found = {}
    for code in CODE.findall(text):
        name, is_setting, value = code.partition(": ")
        if is_setting:
            read = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
            found[name] = read["value"]
    return found
