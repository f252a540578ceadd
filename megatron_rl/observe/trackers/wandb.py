"""Weights & Biases. The only module that imports wandb."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from megatron_rl.errors import ConfigError
from megatron_rl.observe.trackers.tracker import TrackedRun, first_line

SERVER_VARIABLES = ("WANDB_API_KEY",)


class WandbTracker:
    """One run of W&B. The steps of the training run are a metric, `step`, and the axis of all
    others: W&B's own steps cannot be repeated.
    """

    def __init__(self, run: TrackedRun) -> None:
        if not run.is_online:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        try:
            self._run = wandb.init(
                project=run.project,
                name=run.name,
                id=run.identity,
                resume="allow",
                dir=str(run.folder),
                mode="online" if run.is_online else "offline",
                config=run.settings,
                settings=wandb.Settings(
                    console="off", silent=True, disable_git=True, save_code=False
                ),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"tracking.trackers: expected wandb to start, got {first_line(error)}"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.hint = f"wandb sync {shlex.quote(str(run.folder))}/wandb/offline-run-*"
        if run.is_online:
            self.hint = str(self._run.url)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.write`."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()


def start(run: TrackedRun) -> WandbTracker:
    """The tracker of a run."""
    return WandbTracker(run)
