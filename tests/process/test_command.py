"""The command line of every command, and what ends one without an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.errors import NothingToDo
from megatron_rl.process import command
from megatron_rl.process.command import run_command
from megatron_rl.process.folder import AGENT_VARIABLE


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "the following arguments are required: config; usage: "),
        (["a.yaml", "--loop.num_steps=3"], "have no dashes, write loop.num_steps=3; usage: "),
        (["a.yaml", "--loop.num_steps", "3"], "write loop.num_steps=...; usage: "),
        (["a.yaml", "--fast"], "unrecognized arguments: --fast; usage: "),
    ],
)
def test_a_wrong_command_line_is_one_line_of_one_rank(
    argv: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv(AGENT_VARIABLE, str(tmp_path / rank / "error.json"))
        with pytest.raises(SystemExit) as ended:
            run_command("A test.", lambda config, progress: None, argv)
        assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line and line.endswith("config [key=value ...]")


TWO_FAILURES = """
import errno, os, sys, threading, time
from megatron_rl.process.command import run_command
from megatron_rl.process.lifetime import register_cleanup

def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full")

def work(config, progress):
    register_cleanup(lambda: time.sleep(2))  # of the thread that ends the process
    threading.Thread(target=fail).start()
    fail()

sys.exit(run_command("A test.", work, [sys.argv[1]]))
"""


def test_two_threads_on_a_full_disk_tell_it_once(tmp_path: Path) -> None:
    """The second one fails while the first is ending the process."""
    path = tmp_path / "a.yaml"
    path.write_text("{}")
    command_line = [sys.executable, "-c", TWO_FAILURES, str(path)]
    ended = subprocess.run(command_line, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        "OSError: /full: No space left on device; free some space there"
    ]


def test_nothing_to_do_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(config: Any, progress: Any) -> None:
        raise NothingToDo("all 4 steps are done")

    for name in ("watch_signals", "bind_forked_children", "_quiet_libraries"):
        monkeypatch.setattr(command, name, lambda *_: None)
    monkeypatch.setattr(command.threading, "excepthook", None)
    path = tmp_path / "a.yaml"
    path.write_text("{}")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_command("A test.", work, [str(path)]) == 0
    assert capsys.readouterr().out == "all 4 steps are done\n"


@pytest.mark.parametrize("killed", ["rank 1 on here (process 7, last in step 3) has ended", ""])
def test_a_stop_after_another_rank_was_killed_is_told_as_its_end(
    killed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends the others, perhaps before one of them misses the rank in a collective."""
    places: list[Callable[[], str]] = []
    monkeypatch.setattr(command, "watch_signals", places.append)
    for name in ("bind_forked_children", "_quiet_libraries"):
        monkeypatch.setattr(command, name, lambda *_: None)
    monkeypatch.setattr(command.threading, "excepthook", None)
    monkeypatch.setenv("RANK", "0")
    told: list[str] = []

    def work(config: Any, progress: Any) -> None:
        progress.describe = lambda: "in step 3, phase learner"
        progress.meet(SimpleNamespace(others=lambda: "", killed=lambda: killed))
        told.append(places[0]())

    path = tmp_path / "a.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}")
    assert run_command("A test.", work, [str(path)], folder_of=lambda c: Path(c.run_dir)) == 0
    error = tmp_path / "run" / "error.txt"
    if not killed:
        assert told == ["in step 3, phase learner"] and not error.exists()
        return
    assert told == [""]
    stacks = tmp_path / "run" / "logs" / "stacks_of_rank_0.txt"
    line = f"rank 0: another rank ended (in step 3, phase learner): {killed}; stacks in {stacks}\n"
    assert error.read_text() == capsys.readouterr().err == line
    assert "test_command.py" in stacks.read_text()
