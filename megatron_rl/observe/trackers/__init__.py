"""Experiment trackers that a run writes besides TensorBoard, one module for each. None of their
packages is imported unless `tracking.trackers` names it.

Offline, which is the default, a tracker writes files below `<run_dir>/trackers/<name>`. They are
written anew when the run is resumed, from the lines of `metrics.jsonl` before the step that goes
on. So they hold every step once, although trackers buffer what they write and a killed run may
lose it. Online, a resumed run goes on in the tracker's run of before, and a step that is repeated
is sent twice.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.config import Config
from megatron_rl.config.tracking import TrackingConfig
from megatron_rl.errors import ConfigError
from megatron_rl.observe.trackers.tracker import TrackedRun, Tracker

FOLDER, IDENTITY = "trackers", "identity"


def check_trackers(config: TrackingConfig) -> None:
    """Refuse trackers that cannot work, without importing their packages.

    Raises:
        ConfigError: a package is not installed, or an online tracker does not know its server.
    """
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.trackers: expected the package {name}, it is not installed: "
                f"pip install 'megatron_rl[{name}]'"
            )
        variables = _module(name).SERVER_VARIABLES
        is_known = not variables or any(os.environ.get(variable) for variable in variables)
        if config.mode == "online" and not is_known:
            raise ConfigError(
                f"tracking.mode=online: expected the server of {name} in {' or '.join(variables)}, "
                "it is not set"
            )


def start_trackers(
    config: Config, run_dir: Path, *, is_new: bool, history: Sequence[Mapping[str, float | None]]
) -> list[Tracker]:
    """The trackers of a run.

    Args:
        is_new: whether the run begins; otherwise it goes on.
        history: the lines of metrics.jsonl so far.

    Raises:
        ConfigError: see `check_trackers`.
    """
    tracking = config.tracking
    check_trackers(tracking)
    is_online = tracking.mode == "online"
    identity = _identity(run_dir, is_new=is_new) if tracking.trackers else ""
    trackers: list[Tracker] = []
    for name in tracking.trackers:
        folder = run_dir / FOLDER / name
        if not is_online:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        run = TrackedRun(
            project=tracking.project,
            name=_name(config, run_dir),
            identity=identity,
            folder=folder,
            is_online=is_online,
            is_new=is_new,
            settings=json.loads(json.dumps(asdict(config))),
        )
        tracker = _module(name).start(run)
        trackers.append(tracker)
        if not is_online:
            for record in history:
                tracker.write(int(record["step"] or 0), finite(record))
    return trackers


def finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The metrics that are finite numbers, without `step`; trackers differ in how they take
    others.
    """
    return {
        key: float(value)
        for key, value in metrics.items()
        if key != "step" and value is not None and math.isfinite(value)
    }


def _name(config: Config, run_dir: Path) -> str:
    """The run's name; that of a warm start, whose folder is in the run's, says so."""
    name = config.tracking.name or Path(config.run_dir).name
    return name if run_dir == Path(config.run_dir) else f"{name}-{run_dir.name}"


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def _identity(run_dir: Path, *, is_new: bool) -> str:
    """A name for the run that no other run has, and that it keeps when it is resumed."""
    file = run_dir / FOLDER / IDENTITY
    if is_new or not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()
