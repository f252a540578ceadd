"""What the learner's parity tests share: tiny checkpoints, transformers' answers, the learner's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[2]
Outcome = Callable[[str, str], Any]


@pytest.fixture(scope="session")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`parity_models` and then `parity_ranks` in worlds of 1, 2 and 4 wrote into it."""
    folder = tmp_path_factory.mktemp("parity")
    run_module(["-m", "tests.learner.parity_models", str(folder)])
    write_broken(folder / "broken", folder / "qwen2_tied", folder / "qwen3_tied")
    for world_size in (1, 2, 4):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        run_module([*torchrun, "-m", "tests.learner.parity_ranks", str(folder)])
    yield folder
    shutil.rmtree(folder)  # a hundred MB, which pytest would keep for three sessions


@pytest.fixture(scope="session")
def outcome_of(parity_folder: Path) -> Outcome:
    """`outcome_of(model, case)`: what the ranks wrote for it."""

    def load(model: str, case: str) -> Any:
        return torch.load(parity_folder / f"{model}.{case}.pt", weights_only=False)

    return load


@pytest.fixture(scope="session")
def reference_of(parity_folder: Path) -> Callable[[str], dict[str, Any]]:
    """`reference_of(model)`: the recorded batch and what transformers makes of it."""
    return lambda model: torch.load(parity_folder / f"{model}.pt")


def run_module(command: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-6000:]


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
