"""What tests of several of the learner's folders share: the ranks' outcomes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.ranks import ROOT, rank_environment, run_module

Outcome = Callable[[str, str], Any]


@pytest.fixture(scope="session")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that `parity_models` and then `parity_ranks` in worlds of 1, 2 and 4 wrote into."""
    folder = tmp_path_factory.mktemp("parity")
    # An interpreter of its own: torch is patched where the learner runs on the CPU.
    subprocess.run(
        [sys.executable, "-m", "tests.learner.support.parity_models", str(folder)],
        check=True,
        cwd=ROOT,
        env=rank_environment(),
    )
    write_broken(folder / "broken", folder / "qwen2_tied", folder / "qwen3_tied")
    for world_size in (1, 2, 4):
        run_module("tests.learner.support.parity_ranks", folder, ranks=world_size, timeout=300)
    yield folder
    shutil.rmtree(folder)  # a hundred MB, which pytest would keep for three sessions


@pytest.fixture(scope="session")
def outcome_of(parity_folder: Path) -> Outcome:
    """`outcome_of(model, case)`: the outcome that the ranks wrote for it."""

    def load(model: str, case: str) -> Any:
        return torch.load(parity_folder / f"{model}.{case}.pt", weights_only=False)

    return load


@pytest.fixture(scope="session")
def reference_of(parity_folder: Path) -> Callable[[str], dict[str, Any]]:
    """`reference_of(model)`: the recorded batch and the answers of transformers."""
    return lambda model: torch.load(parity_folder / f"{model}.pt")


@pytest.fixture(scope="session")
def four_layers(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its two layers twice, enough for a virtual pipeline on two ranks."""
    folder = tmp_path_factory.mktemp("four_layers") / "model"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    config |= {"num_hidden_layers": 4, "layer_types": 2 * config["layer_types"]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        for layer in (0, 1):
            again = name.replace(f".layers.{layer}.", f".layers.{layer + 2}.")
            if again != name:
                tensors[again] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def single_rank(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What support/single_rank.py found."""
    out = tmp_path_factory.mktemp("single_rank")
    run_module("tests.learner.support.single_rank", tiny_checkpoint, out, ranks=1)
    return torch.load(out / "outcome.pt", weights_only=False)


@pytest.fixture(scope="session")
def edge_outcomes(
    four_layers: Path, recorded_rollouts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """What every rank of support/edge_ranks.py found, by the name of the file."""
    out = tmp_path_factory.mktemp("edges")
    for world_size in (1, 2):
        paths = (four_layers, recorded_rollouts, out)
        run_module("tests.learner.support.edge_ranks", *paths, ranks=world_size)
    return {path.stem: torch.load(path, weights_only=False) for path in out.glob("*.pt")}


def write_broken(folder: Path, sound: Path, yarn: Path) -> None:
    """Copies of a checkpoint, each with one thing wrong."""

    def copy(name: str, source: Path = sound) -> Path:
        return Path(shutil.copytree(source, folder / name))

    def change_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        path = copy(name) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    down = "model.layers.3.mlp.down_proj.weight"
    change_tensors("wrong_shape", lambda tensors: tensors.update({down: torch.zeros(64, 95)}))
    change_tensors("missing_tensor", lambda tensors: tensors.pop(down))
    path = copy("truncated") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (copy("missing_file") / "model.safetensors").unlink()
    for name, source, section, value in (
        ("wrong_heads", sound, "num_key_value_heads", 4),
        ("yarn_factor", yarn, "rope_parameters", {"attention_factor": 1.5}),
    ):
        path = copy(name, source) / "config.json"
        config = json.loads(path.read_text())
        config[section] = config[section] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(config))
