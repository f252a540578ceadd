"""What `run_to_the_end` starts, records and reports, without any training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.process import lifetime
from megatron_rl.records import TOKEN_VARIABLE
from megatron_rl.study import runs
from megatron_rl.study.runs import DONE_FILE, is_finished, run_to_the_end, shared_engines

CONFIG = "configs/quickstart.yaml"


class Launcher:
    """In place of `runs._wait`: remembers what it was asked to start, and ends as told."""

    def __init__(self, code: int = 0, output: bytes = b"") -> None:
        self.code, self.output = code, output
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []

    def __call__(self, command, environment, log) -> int:
        self.commands.append(command)
        self.environments.append(environment)
        log.write(self.output)
        return self.code


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    made = Launcher()
    monkeypatch.setattr(runs, "_wait", made)
    return made


def test_a_run_is_started_once(launcher: Launcher, tmp_path: Path) -> None:
    overrides = ["parallel.tensor=2", "loop.num_steps=1"]
    for _ in range(2):
        assert run_to_the_end(CONFIG, overrides, tmp_path, num_threads=3) == tmp_path
    (command,), (environment,) = launcher.commands, launcher.environments
    assert command[:3] == [sys.executable, "-m", "megatron_rl.process.agent"]
    assert command[command.index("--nproc_per_node") + 1] == "2"
    assert command[-4:] == [CONFIG, *overrides, f"run_dir={tmp_path}"]
    assert environment["OMP_NUM_THREADS"] == "3"
    assert json.loads((tmp_path / DONE_FILE).read_text())["overrides"] == overrides


def test_a_run_on_a_shared_engine_starts_none(launcher: Launcher, tmp_path: Path) -> None:
    checks: list[str] = []
    address = SimpleNamespace(url="http://127.0.0.1:8123", token="secret")
    engine = SimpleNamespace(address=address, check=lambda: checks.append("asked"))
    run_to_the_end(CONFIG, [], tmp_path, engine=engine)
    (command,), (environment,) = launcher.commands, launcher.environments
    assert command[-2:] == ["rollout.num_engines=0", "rollout.urls=[http://127.0.0.1:8123]"]
    assert environment[TOKEN_VARIABLE] == "secret"
    assert "secret" not in " ".join(command)
    assert checks == ["asked"]


def test_a_failed_run_is_not_finished_and_says_why(launcher: Launcher, tmp_path: Path) -> None:
    launcher.code = 1
    launcher.output = b"".join(b"line %d\n" % number for number in range(40))
    with pytest.raises(EngineError) as error:
        run_to_the_end(CONFIG, [], tmp_path)
    assert str(error.value).endswith("line 38\nline 39") and "line 20" not in str(error.value)
    (tmp_path / "error.txt").write_text("DataError: no prompts\n")
    with pytest.raises(EngineError, match=r"got DataError: no prompts$"):
        run_to_the_end(CONFIG, [], tmp_path)
    assert not is_finished(CONFIG, [], tmp_path)
    launcher.code = 0
    run_to_the_end(CONFIG, [], tmp_path)
    assert is_finished(CONFIG, [], tmp_path) and len(launcher.commands) == 3


def test_settings_that_do_not_load_start_nothing(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_step"):
        run_to_the_end(CONFIG, ["loop.num_step=1"], tmp_path)
    assert launcher.commands == []


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    assert not is_finished("a.yaml", ["x=1"], tmp_path)
    (tmp_path / DONE_FILE).write_text('{"config": "a.yaml", "overrides": ["x=1"]}')
    assert is_finished("a.yaml", ["x=1"], tmp_path)
    with pytest.raises(ConfigError, match="choose another output folder"):
        is_finished("a.yaml", ["x=2"], tmp_path)


def test_waiting_gives_the_exit_code_and_leaves_no_cleanup(tmp_path: Path) -> None:
    before = list(lifetime._cleanups)
    with (tmp_path / "log").open("wb") as log:
        command = [
            sys.executable,
            "-c",
            "import os; print(os.environ['WORD']); raise SystemExit(7)",
        ]
        assert runs._wait(command, {"WORD": "hello"}, log) == 7
    assert (tmp_path / "log").read_text() == "hello\n"
    assert lifetime._cleanups == before


class FakeEngine:
    """Counts what is done to an engine."""

    def __init__(self, is_good: bool = True) -> None:
        self.is_good, self.log = is_good, []

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self) -> None:
        self.log.append("ready")
        if not self.is_good:
            raise EngineError("expected an engine, got none")

    def stop(self) -> None:
        self.log.append("stopped")


@pytest.mark.parametrize("is_good", [True, False])
def test_shared_engines_are_stopped_in_every_case(
    is_good: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = [FakeEngine(), FakeEngine(is_good)]
    asked: list[Config] = []

    def start(config: Config, folder: Path) -> list[FakeEngine]:
        asked.append(config)
        return made

    monkeypatch.setattr(runs, "start_engines_of", start)
    before = list(lifetime._cleanups)
    config = runs.load_config(CONFIG, ["rollout.num_engines=1"])
    if is_good:
        with shared_engines(config, tmp_path, count=2) as engines:
            assert engines == made and len(lifetime._cleanups) == len(before) + 2
    else:
        with pytest.raises(EngineError), shared_engines(config, tmp_path, count=2):
            raise AssertionError("not reached")
    assert [engine.log for engine in made] == [["ready", "stopped"]] * 2
    assert asked[0].rollout.num_engines == 2 and asked[0].rollout.urls == []
    assert lifetime._cleanups == before
