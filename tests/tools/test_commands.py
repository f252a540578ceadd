"""The commands that docs and docstrings give for the tools."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "configs").rglob("*.yaml"),
    *TOOLS,
]
IMPORTS_TOOLS = re.compile(r"^(from|import) tools\b", re.MULTILINE)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_a_tool_that_imports_another_is_started_as_a_module(tool: Path) -> None:
    if not IMPORTS_TOOLS.search(tool.read_text(encoding="utf-8")):
        return
    # A script's own folder is on the path, not the repository's.
    wrong = [page.name for page in PAGES if f"python tools/{tool.name}" in page.read_text("utf-8")]
    assert wrong == []


def test_some_tools_import_others() -> None:
    texts = [tool.read_text(encoding="utf-8") for tool in TOOLS]
    assert sum(bool(IMPORTS_TOOLS.search(text)) for text in texts) >= 2
