"""Trackio. The only module that imports trackio."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
from collections.abc import Mapping

from megatron_rl.errors import ConfigError
from megatron_rl.observe.trackers.tracker import TrackedRun, first_line

SERVER_VARIABLES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
_OTHER_VARIABLES = ("TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID")  # by which it would send files


class TrackioTracker:
    """One run of Trackio, which has at most one in a process."""

    def __init__(self, run: TrackedRun) -> None:
        # Trackio reads its folder when it is imported.
        os.environ["TRACKIO_DIR"] = str(run.folder.resolve())
        if not run.is_online:
            for variable in (*SERVER_VARIABLES, *_OTHER_VARIABLES):
                os.environ.pop(variable, None)
        import trackio

        self._trackio = trackio
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                trackio.init(
                    project=run.project,
                    # On a server another run may have the name.
                    name=f"{run.name}-{run.identity}" if run.is_online else run.name,
                    resume="allow",
                    config=run.settings,
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"tracking.trackers: expected trackio to start, got {first_line(error)}"
            ) from error
        folder, project = shlex.quote(str(run.folder.resolve())), shlex.quote(run.project)
        self.hint = f"TRACKIO_DIR={folder} trackio show --project {project}"
        if run.is_online:
            self.hint = f"Trackio run {run.name}-{run.identity} of {run.project}"

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.write`."""
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        """See `Tracker.close`."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


def start(run: TrackedRun) -> TrackioTracker:
    """The tracker of a run."""
    return TrackioTracker(run)
