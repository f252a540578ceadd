"""What trackers are told of a run that begins, goes on, and is tracked after its end; with
stand-ins for their packages.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rl.config import Config, TrackingConfig
from megatron_rl.config.file import save_config
from megatron_rl.errors import ConfigError
from megatron_rl.observe.recorder import Recorder
from megatron_rl.observe.trackers import check_trackers, start_trackers
from tests.fakes.trackers import FakePackages
from tools import track_run

ALL = ["mlflow", "trackio", "wandb"]
VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "TRACKIO_DIR",
    "TRACKIO_SPACE_ID",
    "TRACKIO_SERVER_URL",
    "WANDB_API_KEY",
    "WANDB_ERROR_REPORTING",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> FakePackages:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    return FakePackages(monkeypatch)


def config_of(run_dir: Path, *trackers: str, **tracking: str) -> Config:
    return Config(
        run_dir=str(run_dir), tracking=TrackingConfig(trackers=list(trackers), **tracking)
    )


def record(config: Config, *steps: int, last_step: int = -1, rank: int = 0) -> str:
    """Records steps, and returns what is printed at the end."""
    stream = io.StringIO()
    recorder = Recorder(
        config.run_dir,
        rank=rank,
        num_steps=9,
        last_step=last_step,
        console=Console(file=stream, width=200),
        config=config,
    )
    with recorder:
        for step in steps:
            recorder.write(step, {"reward/mean": step / 10, "loss/mean": float("nan")})
        recorder.summarize()
    return stream.getvalue()


def test_a_run_is_told_to_every_tracker_offline(packages: FakePackages, tmp_path: Path) -> None:
    run_dir = tmp_path / "first"
    os.environ["TRACKIO_SPACE_ID"] = "somebody/space"
    printed = record(config_of(run_dir, *ALL), 0, 1)
    [wandb] = packages.told("wandb", "init")
    identity = (run_dir / "trackers" / "identity").read_text().strip()
    assert (wandb["mode"], wandb["name"], wandb["id"]) == ("offline", "first", identity)
    assert wandb["dir"] == str(run_dir / "trackers" / "wandb")
    assert wandb["config"]["loop"]["prompts_per_step"] == 64
    assert packages.told("wandb", "log") == [
        {"step": 0, "reward/mean": 0.0},  # what is not finite is left out
        {"step": 1, "reward/mean": 0.1},
    ]
    assert (("*",), {"step_metric": "step"}) in packages.told("wandb", "define")
    [uri] = packages.told("mlflow", "client")
    assert uri == f"sqlite:///{run_dir / 'trackers' / 'mlflow' / 'mlflow.db'}"
    assert packages.told("mlflow", "metrics") == [[("reward/mean", s / 10, s)] for s in (0, 1)]
    params = dict(each for batch in packages.told("mlflow", "params") for each in batch)
    assert params["loop.prompts_per_step"] == "64"
    [trackio] = packages.told("trackio", "init")
    assert (trackio["project"], trackio["name"]) == ("megatron_rl", "first")
    assert "TRACKIO_SPACE_ID" not in os.environ  # by which it would go online
    assert os.environ["TRACKIO_DIR"] == str(run_dir / "trackers" / "trackio")
    assert packages.told("trackio", "log") == [(s, {"reward/mean": s / 10}) for s in (0, 1)]
    ends = [("wandb", "finish"), ("mlflow", "end"), ("trackio", "finish")]
    assert all(len(packages.told(*end)) == 1 for end in ends)
    assert printed.count("tracked: ") == 3 and "tracked: wandb sync " in printed


def test_offline_a_resumed_run_is_written_anew(packages: FakePackages, tmp_path: Path) -> None:
    """What a killed run had not written is there, and what is repeated is there once."""
    config = config_of(tmp_path, *ALL)
    record(config, 0, 1, 2, 3)
    left = tmp_path / "trackers" / "wandb" / "offline-run-1"
    left.mkdir(parents=True)
    packages.log.clear()
    record(config, 2, 3, last_step=1)
    assert [line["step"] for line in packages.told("wandb", "log")] == [0, 1, 2, 3]
    assert [step for step, _ in packages.told("trackio", "log")] == [0, 1, 2, 3]
    assert [batch[0][2] for batch in packages.told("mlflow", "metrics")] == [0, 1, 2, 3]
    assert not left.exists()
    identity = (tmp_path / "trackers" / "identity").read_text().strip()
    assert packages.told("wandb", "init")[0]["id"] == identity
    record(config, 0)  # another run in the same folder
    assert (tmp_path / "trackers" / "identity").read_text().strip() != identity


def test_online_a_resumed_run_goes_on(
    packages: FakePackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID"):
        monkeypatch.setenv(variable, "https://server")
    config = config_of(tmp_path, *ALL, mode="online", name="mine", project="ours")
    record(config, 0, 1)
    record(config, 1, last_step=0)
    assert [line["step"] for line in packages.told("wandb", "log")] == [0, 1, 1]
    first, second = packages.told("wandb", "init")
    assert first["id"] == second["id"] and first["mode"] == "online"
    assert packages.told("mlflow", "client") == ["https://server"] * 2
    assert packages.told("mlflow", "create") == ["mine"]  # once
    names = {(told["project"], told["name"]) for told in packages.told("trackio", "init")}
    assert names == {("ours", f"mine-{first['id']}")}
    assert os.environ["TRACKIO_SPACE_ID"] == "https://server"


def test_other_ranks_track_nothing(packages: FakePackages, tmp_path: Path) -> None:
    record(config_of(tmp_path, *ALL), 0, rank=1)
    assert packages.log == [] and list(tmp_path.iterdir()) == []


def test_a_run_without_trackers_writes_no_folder(packages: FakePackages, tmp_path: Path) -> None:
    record(config_of(tmp_path), 0)
    assert packages.log == [] and not (tmp_path / "trackers").exists()


def test_a_server_that_does_not_answer_ends_no_run(
    packages: FakePackages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://server")
    packages.fails_from = 1
    with caplog.at_level(logging.WARNING):
        record(config_of(tmp_path, "mlflow", mode="online"), 0, 1, 2)
    assert [batch[0][2] for batch in packages.told("mlflow", "metrics")] == [0]
    assert "2 steps could not be written; the first: step 1: FakeFailure: no answer;" in caplog.text


def test_what_cannot_work_is_told_before_the_run(
    packages: FakePackages, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="mode=online: expected the server of mlflow in MLFLOW_T"):
        check_trackers(TrackingConfig(trackers=["mlflow"], mode="online"))
    check_trackers(TrackingConfig(trackers=ALL))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'megatron_rl\[wandb\]'"):
        check_trackers(TrackingConfig(trackers=["wandb"]))
    with pytest.raises(ConfigError, match="trackers: expected mlflow, trackio or wandb, got 'aim'"):
        TrackingConfig(trackers=["aim"])
    with pytest.raises(ConfigError, match="trackers: expected each one once, got wandb, wandb"):
        TrackingConfig(trackers=["wandb", "wandb"])


def test_names_that_mlflow_refuses_are_changed(packages: FakePackages, tmp_path: Path) -> None:
    [tracker] = start_trackers(config_of(tmp_path, "mlflow"), tmp_path, is_new=True, history=[])
    tracker.write(3, {"reward/my task (b)+c/mean": 1.0, "eval/a-b.c/avg_at_8": 0.5})
    [batch] = packages.told("mlflow", "metrics")
    assert [name for name, _, _ in batch] == ["reward/my task _b__c/mean", "eval/a-b.c/avg_at_8"]


def test_a_warm_start_has_a_name_of_its_own(packages: FakePackages, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", "wandb")
    start_trackers(config, tmp_path / "run" / "warm_start", is_new=True, history=[])
    assert packages.told("wandb", "init")[0]["name"] == "run-warm_start"


def test_a_run_that_has_ended_is_tracked_by_the_tool(
    packages: FakePackages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path)
    assert track_run.main([str(tmp_path), "wandb"]) == 1  # there is no run
    record(config, 0, 1)
    save_config(config, tmp_path / "config.yaml")
    assert track_run.main([str(tmp_path), "wandb", "trackio", "tracking.name=later"]) == 0
    assert [line["step"] for line in packages.told("wandb", "log")] == [0, 1]
    assert packages.told("trackio", "init")[0]["name"] == "later"
    assert "2 lines: wandb sync" in capsys.readouterr().out
