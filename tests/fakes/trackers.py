"""Stand-ins for the packages of experiment trackers, which note what they are told."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class FakeFailure(Exception):
    """As `mlflow.exceptions.MlflowException` and `wandb.errors.Error`."""


class FakePackages:
    """Replaces wandb, mlflow and trackio; `log` has every call as (package, what, details)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.fails_from: float = float("inf")  # step from which mlflow does not answer
        self.mlflow_runs: dict[str, str] = {}  # identity -> id
        self._monkeypatch = monkeypatch
        self._add("wandb", init=self._init_wandb, Settings=dict, errors=self._errors("Error"))
        self._add("mlflow", MlflowClient=self._mlflow_client)
        self._add("mlflow.entities", Metric=_metric, Param=lambda key, value: (key, value))
        self._add("mlflow.exceptions", MlflowException=FakeFailure)
        self._add(
            "trackio",
            init=lambda **told: self._note("trackio", "init", told),
            log=lambda metrics, step: self._note("trackio", "log", (step, metrics)),
            finish=lambda: self._note("trackio", "finish"),
        )

    def told(self, package: str, what: str) -> list[Any]:
        """The details of all calls of one kind."""
        return [each[2] for each in self.log if each[:2] == (package, what)]

    def _note(self, package: str, what: str, details: Any = None) -> None:
        self.log.append((package, what, details))

    def _add(self, name: str, **content: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        self._monkeypatch.setitem(sys.modules, name, module)

    @staticmethod
    def _errors(name: str) -> SimpleNamespace:
        return SimpleNamespace(**{name: FakeFailure})

    def _init_wandb(self, **told: Any) -> SimpleNamespace:
        self._note("wandb", "init", told)
        return SimpleNamespace(
            url="https://wandb/run",
            define_metric=lambda *names, **keys: self._note("wandb", "define", (names, keys)),
            log=lambda values: self._note("wandb", "log", values),
            finish=lambda: self._note("wandb", "finish"),
        )

    def _mlflow_client(self, tracking_uri: str) -> SimpleNamespace:
        self._note("mlflow", "client", tracking_uri)

        def create_run(experiment_id: str, run_name: str, tags: dict[str, str]) -> SimpleNamespace:
            self._note("mlflow", "create", run_name)
            [identity] = tags.values()
            self.mlflow_runs[identity] = f"id of {run_name}"
            return SimpleNamespace(info=SimpleNamespace(run_id=self.mlflow_runs[identity]))

        def search_runs(ids: list[str], query: str, max_results: int) -> list[SimpleNamespace]:
            identity = query.split("'")[1]
            found = [self.mlflow_runs[identity]] if identity in self.mlflow_runs else []
            return [SimpleNamespace(info=SimpleNamespace(run_id=each)) for each in found]

        def log_batch(run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(metrics) <= 1000 and len(params) <= 100  # as the server
            if any(metric[2] >= self.fails_from for metric in metrics):
                raise FakeFailure("no answer\nat all")
            self._note("mlflow", "params" if params else "metrics", [*metrics, *params])

        return SimpleNamespace(
            get_experiment_by_name=lambda name: SimpleNamespace(experiment_id=f"id of {name}"),
            create_run=create_run,
            search_runs=search_runs,
            log_batch=log_batch,
            set_terminated=lambda run_id: self._note("mlflow", "end", run_id),
        )


def _metric(key: str, value: float, timestamp: int, step: int) -> tuple[str, float, int]:
    return key, value, step
