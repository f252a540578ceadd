"""The soak's figures, picture and verdict, on a process and a run folder made here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_rl.rollout.recording import forget_before, write_step
from tests.fakes.groups import judged, scored
from tools import soak

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def folder_of(run_dir: Path, *steps: list[int], lost: bool = False) -> Path:
    """A run whose step n used the prompts of `steps[n - 1]`, with two engines."""
    run_dir.mkdir()
    lines = [{"step": step} for step in range(len(steps) + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for step, prompts in enumerate(steps, start=1):
        groups = [judged(scored(index, 1.0, 0.0), 1.0, -1.0) for index in prompts]
        write_step(run_dir / "rollouts", step, 0, groups, num_ranks=1)
    received = [["a", "b"], ["a"], ["a"] if lost else ["a", "b"]]
    syncs = [json.dumps({"received": {url: [] for url in urls}}) for urls in received]
    (run_dir / "sync.jsonl").write_text("\n".join(syncs) + "\n")
    return run_dir


def test_what_is_lost_is_told(tmp_path: Path) -> None:
    def losses(run_dir: Path) -> list[str]:
        return soak.losses(run_dir, soak.UsedPrompts(run_dir))

    assert losses(folder_of(tmp_path / "a", [0, 1], [2, 3])) == []
    assert losses(folder_of(tmp_path / "b", [0, 1], [1, 2])) == ["prompts: one was used twice"]
    assert losses(folder_of(tmp_path / "c", [0], [1], lost=True)) == [
        "engine b: in 1 publication only"
    ]
    skipped = folder_of(tmp_path / "d", [0, 1], [3, 4], [5, 6], [7, 8])
    assert losses(skipped) == ["prompts: 1 were skipped, the first is 2"]


def test_prompts_are_read_before_their_files_are_deleted(tmp_path: Path) -> None:
    run_dir = folder_of(tmp_path / "a", [0, 1], [2, 3], [4, 5])
    used = soak.UsedPrompts(run_dir)
    used.look()
    assert used.of_step == {1: [0, 1], 2: [2, 3]}  # the last one may not be complete
    forget_before(run_dir / "rollouts", 3)
    used.look()
    assert soak.losses(run_dir, used) == []
    assert used.of_step[3] == [4, 5]


def test_what_a_guard_has_started_is_an_engine() -> None:
    engine = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
    guard = [sys.executable, "-m", "megatron_rl.process.guard", *engine]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(guard, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline()
        learner, engines = soak.processes_of(psutil.Process())
        own = {process.pid, *(each.pid for each in psutil.Process(process.pid).children())}
        assert own <= {each.pid for each in engines} and len(own) > 1
        assert not own & {each.pid for each in learner}
        process.stdin.close()  # ends both


def test_figures_of_processes_and_a_picture(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2**20))
    code = "import time; print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        figures = soak.sample(psutil.Process(process.pid), tmp_path)
        process.kill()
    assert figures["disk_mib"] == pytest.approx(1.0)
    assert (figures["threads"], figures["engines_mib"]) == (1, 0)
    assert figures["learner_mib"] > 1 and figures["fds"] >= 3
    samples = [
        {"seconds": float(second), "is_kill": second == 3} | dict.fromkeys(soak.FIGURES, second)
        for second in range(8)
    ]
    assert soak.quarters(samples, "fds") == (2.5, 6.5)
    soak.draw(samples, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 1000


def test_settings_come_after_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the usage says; what the run is started with comes before them, on ranks of the config."""
    started: list[list[str]] = []

    def start(command: list[str], **_settings: object) -> None:
        started.append(command)
        raise AssertionError

    monkeypatch.setattr(subprocess, "Popen", start)
    own = ["model.path=m", "loop.seed=1"]
    with pytest.raises(AssertionError):
        soak.main([QUICKSTART, "--work", str(tmp_path), "--seconds", "9", *own])
    assert started[0][-2:] == own
    assert f"run_dir={tmp_path / 'run'}" in started[0]
    assert "--nproc_per_node=2" in started[0]


def test_a_run_that_ends_by_itself_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = subprocess.Popen

    def start(_command: list[str], **settings: object) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-c", "raise SystemExit(3)"], **settings)

    monkeypatch.setattr(subprocess, "Popen", start)
    assert soak.main([QUICKSTART, "--work", str(tmp_path), "model.path=m"]) == 1
    told = capsys.readouterr().err
    assert "got code 3" in told and str(tmp_path / "console.log") in told
