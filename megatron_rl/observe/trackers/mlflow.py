"""MLflow. The only module that imports mlflow.

Offline, the run is in an SQLite database. Online, a server that does not answer must not end a run
of days: what could not be sent is counted and told when the run ends.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.config.presets import dotted
from megatron_rl.errors import ConfigError
from megatron_rl.observe.trackers.tracker import TrackedRun, first_line

logger = logging.getLogger(__name__)

SERVER_VARIABLES = ("MLFLOW_TRACKING_URI",)
_TAG = "megatron_rl.identity"
# What names of metrics and parameters must not hold.
_FOREIGN = re.compile(r"[^\w\-. :/]", re.ASCII)
_MAX_VALUE_LENGTH, _MAX_BATCH = 500, 100


class MlflowTracker:
    """One run of MLflow. The settings are its parameters."""

    def __init__(self, run: TrackedRun) -> None:
        for variable, value in _environment(run.is_online).items():
            os.environ.setdefault(variable, value)
        import mlflow
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._metric, self._param, self._failure = Metric, Param, MlflowException
        uri = f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
        self.hint = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        if run.is_online:
            uri = os.environ[SERVER_VARIABLES[0]]
            self.hint = f"MLflow run {run.name} of {run.project} at {uri}"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._num_lost, self._first_loss = 0, ""
        try:
            self._run_id = self._find(run) or self._create(run)
        except MlflowException as error:
            raise ConfigError(
                f"tracking.trackers: expected mlflow to start a run at {uri}, got "
                f"{first_line(error)}"
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.write`."""
        now = int(time.time() * 1000)
        batch = [
            self._metric(_FOREIGN.sub("_", key), value, now, step) for key, value in metrics.items()
        ]
        self._send(step, batch)

    def close(self) -> None:
        """See `Tracker.close`."""
        try:
            self._client.set_terminated(self._run_id)
        except self._failure as error:
            self._first_loss = self._first_loss or f"the end of the run: {first_line(error)}"
        if self._first_loss:
            logger.warning(
                "mlflow: %d steps could not be written; the first: %s; metrics.jsonl has them, and "
                "tools/track_run.py writes them again",
                self._num_lost,
                self._first_loss,
            )

    def _send(self, step: int, batch: Sequence[Any]) -> None:
        try:
            for start in range(0, len(batch), _MAX_BATCH):
                self._client.log_batch(self._run_id, metrics=batch[start : start + _MAX_BATCH])
        except self._failure as error:
            self._num_lost += 1
            self._first_loss = self._first_loss or f"step {step}: {first_line(error)}"

    def _find(self, run: TrackedRun) -> str:
        """The id of the run on the server, if it goes on there; else ""."""
        experiment = self._client.get_experiment_by_name(run.project)
        if not run.is_online or run.is_new or experiment is None:
            return ""
        found = self._client.search_runs(
            [experiment.experiment_id], f"tags.`{_TAG}` = '{run.identity}'", max_results=1
        )
        return found[0].info.run_id if found else ""

    def _create(self, run: TrackedRun) -> str:
        experiment = self._client.get_experiment_by_name(run.project)
        if experiment is None:
            artifacts = None if run.is_online else (run.folder.resolve() / "artifacts").as_uri()
            experiment_id = self._client.create_experiment(run.project, artifact_location=artifacts)
        else:
            experiment_id = experiment.experiment_id
        created = self._client.create_run(
            experiment_id, run_name=run.name, tags={_TAG: run.identity}
        )
        params = [
            self._param(_FOREIGN.sub("_", key), str(value)[:_MAX_VALUE_LENGTH])
            for key, value in dotted(run.settings).items()
        ]
        for start in range(0, len(params), _MAX_BATCH):
            self._client.log_batch(created.info.run_id, params=params[start : start + _MAX_BATCH])
        return created.info.run_id


def _environment(is_online: bool) -> dict[str, str]:
    if is_online:  # a server that does not answer delays a step by seconds, not by minutes
        return {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    return {"MLFLOW_DISABLE_TELEMETRY": "true"}


def start(run: TrackedRun) -> MlflowTracker:
    """The tracker of a run."""
    return MlflowTracker(run)
