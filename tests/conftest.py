"""What tests of several folders share: tiny models, recorded rollouts, one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.balance import ByEngine, rank_of
from tests.support.models import write_sharp_model, write_tiny_model
from tests.support.ranks import run_module
from tests.support.served_engine import ServedEngine
from tests.support.short_run import write_short_run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The scopes that take longest come first."""
    items.sort(key=lambda item: rank_of(item.nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByEngine:
    """How xdist deals the files to its processes (`tests/run.sh`)."""
    return ByEngine(config, log)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 2 layers and hidden size 64 with a character tokenizer (vocabulary of 128)."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def sharp_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 2 layers whose probabilities tell its weights apart; see support/models.py."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    write_sharp_model(folder)
    return folder


@pytest.fixture(scope="session")
def recorded_rollouts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of `tiny_checkpoint` for several steps, made without an engine; see
    learner/recorded.py.
    """
    folder = tmp_path_factory.mktemp("recorded") / "rollouts"
    run_module("tests.learner.recorded", tiny_checkpoint, folder, ranks=0)
    return folder


@pytest.fixture(scope="session")
def write_config(sharp_checkpoint: Path) -> Callable[..., Path]:
    """`write_config(folder, **sections)`: the YAML of a short run of `sharp_checkpoint`."""

    def write(folder: Path, **sections: dict[str, Any]) -> Path:
        return write_short_run(folder, sharp_checkpoint, sections)

    return write


@pytest.fixture(scope="session")
def served_engine(
    sharp_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedEngine]:
    """One float32 engine for all runs of the session that are given theirs."""
    engine = ServedEngine(sharp_checkpoint, tmp_path_factory.mktemp("served"))
    yield engine
    engine.stop()
