"""The commands that docs and docstrings give for the tools."""

from __future__ import annotations

import ast
import importlib
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


# Of each tool that reads or writes what its user names: the words before and behind that path.
READERS = {
    "compare_runs": ([], ["PATH"]),
    "convert_checkpoint": ([], ["-o", "OUT"]),
    "explain_discrepancy": ([], ["-o", "OUT"]),
    "inspect_rollouts": ([], []),
    "plan": ([], []),
    "plot_run": ([], []),
    "probe_power": (["table"], []),
    "quantize_checkpoint": ([], ["-o", "OUT", "--format", "int8"]),
    "select_prompts": ([], ["-o", "OUT"]),
    "soak": ([], ["--work", "OUT"]),
    "study_ages": (["report"], ["--docs", "OUT"]),
    "study_discrepancy": (["report"], ["--docs", "OUT"]),
    "track_run": ([], ["wandb"]),
}
WRITERS = {
    "make_dapo_like": ([], ["--different", "2", "--times", "1"]),
    "make_tiny_model": ([], []),
    "stale_cache_gap": (["--work"], []),
}


def tell(
    tool: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The only line that a tool prints when it fails."""
    module = importlib.import_module(f"tools.{tool}")
    if hasattr(module, "watch_signals"):
        monkeypatch.setattr(module, "watch_signals", lambda describe: None)
    assert module.main(words) in (1, 2)
    out, told = capsys.readouterr()
    assert out == ""
    [line] = told.splitlines()
    return line


@pytest.mark.parametrize("tool", READERS)
@pytest.mark.parametrize("kind", ["nothing", "a text", "a folder", "bytes"])
def test_a_path_to_something_else_is_one_line(
    tool: str,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, out = tmp_path / "given", tmp_path / "out"
    if kind == "a folder":
        path.mkdir()
    elif kind != "nothing":
        path.write_bytes(b"hello\n" if kind == "a text" else b"\xff\xfe\0\1")
    before, behind = READERS[tool]
    words = [*before, str(path), *behind]
    words = [str(path) if word == "PATH" else str(out) if word == "OUT" else word for word in words]
    line = tell(tool, words, capsys, monkeypatch)
    assert line.startswith(f"{tool}: ") and str(path) in line
    assert "[Errno" not in line


@pytest.mark.parametrize("tool", WRITERS)
def test_a_place_that_cannot_be_written_is_one_line(
    tool: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("hello")
    before, behind = WRITERS[tool]
    words = [*before, str(tmp_path / "file" / "below"), *behind]
    line = tell(tool, words, capsys, monkeypatch)
    assert line.startswith(f"{tool}: {tmp_path / 'file'}")
    assert line.endswith(("Not a directory", "File exists")) or "Not a directory" in line


def test_every_tool_that_reads_or_writes_a_path_is_tried() -> None:
    """Those that take a config end as a run does (`run_command`); the others measure."""
    with_paths = {
        tool.stem
        for tool in TOOLS
        for node in ast.walk(ast.parse(tool.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "run_tool"
    }
    assert with_paths == READERS.keys() | WRITERS.keys()


@pytest.mark.parametrize(
    ("tool", "words", "told"),
    [
        ("plot_run", ["RUN", "-o", "x.nosuch"], "--output: expected a name that ends in .png"),
        ("plot_run", ["RUN"], "expected UTF-8 text, got byte 0"),
        ("compare_runs", ["RUN", "RUN"], "metrics.jsonl, line 1: expected a JSON object"),
        ("inspect_rollouts", ["RUN"], "expected step_000000.rank0.jsonl or others, got none"),
        ("select_prompts", ["RUN", "-o", "OUT"], "expected step_000000.rank0.jsonl or others"),
        ("track_run", ["RUN", "wandb"], "expected UTF-8 text, got byte 0"),
        ("plan", ["RUN/config.yaml", "--gpu-gb", "inf"], "--gpu-gb: expected numbers above 0"),
        ("make_tiny_model", ["OUT", "--layers", "-1"], "--layers: expected 1 or more, got -1"),
        ("make_tiny_model", ["OUT", "--heads", "3"], "--kv-heads: expected a divisor of --heads 3"),
        ("make_tiny_model", ["OUT", "--chosen-experts", "9"], "at most --experts 8, got 9"),
        ("make_dapo_like", ["OUT", "--times", "-1"], "expected numbers of 1 or more"),
        ("make_dapo_like", ["RUN"], "expected the name of a file to write, got a folder"),
    ],
)
def test_a_broken_run_and_an_impossible_number_are_one_line(
    tool: str,
    words: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text("loop: {num_steps: 1}\n")
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\0")
    (run / "rollouts" / "step_abc.rank0.jsonl").write_text("")
    given = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in words]
    line = tell(tool, given, capsys, monkeypatch)
    assert line.startswith(f"{tool}: ") and told in line
