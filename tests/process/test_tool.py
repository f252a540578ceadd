"""What the user of a tool can mend is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.errors import ConfigError, DataError, EngineError
from megatron_rl.process.tool import BROKEN_PIPE, run_tool


def fail_with(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("a.csv: expected a header"), "a.csv: expected a header"),
        (ConfigError("--to: expected megatron"), "--to: expected megatron"),
        (EngineError("engine 0 died"), "engine 0 died"),
        (OSError(28, "No space left on device", "/a/b"), "/a/b: No space left on device"),
        (OSError(21, "Is a directory", "/a", None, "/b"), "/a -> /b: Is a directory"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (FileNotFoundError("runs/a: expected a folder"), "runs/a: expected a folder"),
    ],
    ids=str,
)
def test_one_line(error: Exception, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("plot_run", lambda: fail_with(error)) == 1
    assert capsys.readouterr() == ("", f"plot_run: {told}\n")
    assert run_tool("compare_runs", lambda: fail_with(error), code=2) == 2


def test_a_fault_of_the_tool_is_no_mistake_of_its_user() -> None:
    with pytest.raises(KeyError):
        run_tool("plot_run", lambda: fail_with(KeyError("x")))


def test_the_exit_code_of_the_work() -> None:
    assert run_tool("plot_run", lambda: None) == 0
    assert run_tool("compare_runs", lambda: 3) == 3


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """As in `python tools/inspect_rollouts.py RUN | head -1`."""
    script = tmp_path / "long.py"
    script.write_text(
        "import sys\n"
        "from megatron_rl.process.tool import run_tool\n"
        "def work():\n"
        "    for number in range(100_000): print(number)\n"
        "sys.exit(run_tool('long', work))\n"
    )
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == BROKEN_PIPE
    process.stderr.close()
