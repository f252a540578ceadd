"""Transformer Engine's layers, built without a GPU: their parameters are those of our table of
names, with the shapes of its shards; the export sends each Hugging Face tensor once; and a
checkpoint of Megatron's own layers holds the tensors that Transformer Engine's would load. What is
found out in a process of its own stands in te_names.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.learner.support.te_names import EXPERT_LAYOUTS, LAYOUTS
from tests.support.ranks import ROOT, rank_environment
from tests.support.transformer_engine import packages

# Tied with norms of queries and keys; with biases; with neither.
SHAPES = ("Qwen3-0.6B", "Qwen2.5-7B", "Llama-3.1-70B")
NUM_LAYERS = 4
MIXTURES = ("Qwen3-30B-A3B", "Mixtral-8x7B")
# Parameters of a decoder layer: two norms and four projections, and what the family adds.
OF_A_LAYER = {"Qwen3-0.6B": 8, "Qwen2.5-7B": 7, "Llama-3.1-70B": 6}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("te_names") / "found.json"
    shapes = [str(ROOT / "configs" / "shapes" / name) for name in (*SHAPES, *MIXTURES)]
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.learner.support.te_names",
            str(packages()),
            str(out),
            *shapes,
        ],
        cwd=ROOT,
        env=rank_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    return json.loads(out.read_text())


every_case = pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, layout) for shape in SHAPES for layout in LAYOUTS]
    + [(shape, layout) for shape in MIXTURES for layout in EXPERT_LAYOUTS],
)


@every_case
def test_names_and_shapes_are_those_of_the_table(
    shape: str, layout: str, found: dict[str, Any]
) -> None:
    case = found[f"{shape}.{layout}"]
    assert case["names"] == []
    assert case["modules"] == [
        "megatron.TELayerNormColumnParallelLinear",
        "megatron.TERowParallelGroupedLinear"
        if shape in MIXTURES
        else "megatron.TERowParallelLinear",
    ]
    if shape in MIXTURES:
        return
    world_size, sizes = LAYOUTS[layout]
    pipeline = sizes.get("pipeline", 1)
    ends = 3 if shape != "Qwen3-0.6B" or pipeline > 1 else 2  # embedding, norm, head
    per_tensor_rank = NUM_LAYERS * OF_A_LAYER[shape] + ends
    assert case["num_parameters"] == world_size // pipeline * per_tensor_rank


@every_case
def test_every_tensor_is_exported_once(shape: str, layout: str, found: dict[str, Any]) -> None:
    assert found[f"{shape}.{layout}"]["export"] == []


@every_case
def test_a_checkpoint_of_megatrons_layers_has_their_tensors(
    shape: str, layout: str, found: dict[str, Any]
) -> None:
    case = found[f"{shape}.{layout}"]
    assert case["only_one"] == []
    # States without contents, which a loading run does without (model/checkpoint.py).
    assert {name.rsplit(".", 1)[1] for name in case["objects"]} <= {"_extra_state"}


def test_it_is_the_release_of_the_gpu_profile(found: dict[str, Any]) -> None:
    pins = (ROOT / "requirements" / "te-names.txt").read_text()
    assert f"transformer-engine=={found['version']}\n" in pins


def test_the_folder_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packages()

    def no_process(*_: Any, **__: Any) -> None:
        raise AssertionError("expected no second installation")

    monkeypatch.setattr(subprocess, "run", no_process)
    assert packages() == folder
    assert os.path.isdir(folder / "transformer_engine")
