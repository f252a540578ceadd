"""Names of models and data sets in the hub's local cache, in place of folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.config.file import load_config
from megatron_rl.config.hub import cached_folder, is_name, model_folder
from megatron_rl.data.paths import data_files
from megatron_rl.errors import DataError
from megatron_rl.weights.geometry import read_geometry
from tests.support.hub import empty_cache, fetched

CONFIG = {"config.json": b"{}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a working directory without files."""
    return empty_cache(tmp_path, monkeypatch)


def config_file(folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text("run_dir: runs/a\n")
    return path


def test_a_model_and_a_reference_of_the_cache(hub: Path, tmp_path: Path) -> None:
    snapshot = fetched(hub, "model", "Qwen/Qwen3-0.6B", CONFIG)
    names = ["model.path=Qwen/Qwen3-0.6B", "objective.kl.reference=Qwen/Qwen3-0.6B"]
    config = load_config(config_file(tmp_path), names)
    assert (config.model.path, config.objective.kl.reference) == (str(snapshot),) * 2
    assert Path(config.model.path, "config.json").is_file()


def test_what_an_argument_of_a_tool_names(hub: Path) -> None:
    snapshot = fetched(hub, "model", "Qwen/Qwen3-0.6B", CONFIG)
    assert model_folder("Qwen/Qwen3-0.6B") == str(snapshot)
    for path in ("Qwen/Qwen3-8B", "/models/Qwen3-8B", ""):
        assert model_folder(path) == path


def test_a_folder_of_the_same_name_comes_first(hub: Path, tmp_path: Path) -> None:
    fetched(hub, "model", "runs/model", CONFIG)
    Path("runs/model").mkdir(parents=True)
    assert load_config(config_file(tmp_path), ["model.path=runs/model"]).model.path == "runs/model"


def test_a_name_that_was_not_fetched_says_how(hub: Path, tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path), ["model.path=Qwen/Qwen3-0.6B"])
    assert config.model.path == "Qwen/Qwen3-0.6B"
    with pytest.raises(DataError) as raised:
        read_geometry(config.model.path)
    assert str(raised.value) == (
        "model.path: expected a Hugging Face checkpoint with a config.json, got none at "
        f"Qwen/Qwen3-0.6B/config.json, nor Qwen/Qwen3-0.6B in the hub's cache {hub}; if it is a "
        "name on the Hugging Face hub, fetch it with: hf download Qwen/Qwen3-0.6B"
    )


def test_a_data_set_of_the_cache(hub: Path) -> None:
    files = {"train-0.parquet": b"PAR1", "README.md": b""}
    snapshot = fetched(hub, "dataset", "openai/gsm8k", files)
    assert data_files("openai/gsm8k", "path") == [snapshot / "train-0.parquet"]
    with pytest.raises(DataError, match=r"hf download open-r1/dapo --repo-type dataset$"):
        data_files("open-r1/dapo", "path")
    assert cached_folder("openai/gsm8k") == ""  # a data set is no model


@pytest.mark.parametrize(
    "path", ["", "gpt2", "a/b/c", "/models/qwen", "./model", "../model", "~/model", "a/", "a b/c"]
)
def test_what_cannot_be_a_name(path: str, hub: Path) -> None:
    assert not is_name(path)


def test_the_cache_of_hf_home(tmp_path: Path) -> None:
    snapshot = fetched(tmp_path / "home" / "hub", "model", "Qwen/Qwen3-0.6B", CONFIG)
    code = "from megatron_rl.config.hub import cached_folder; print(cached_folder(input()))"
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        input="Qwen/Qwen3-0.6B\n",
        env=variables | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.strip() == str(snapshot)
