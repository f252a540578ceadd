"""Overlapped communication, and moving the optimizer's state away and back, change no bit of the
weights: with both optimizers and precisions, also in a virtual pipeline and with context
parallelism, with updates that are taken back and a checkpoint, in turns with engines as in the
loop. What the ranks do stands in
overlap_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learner.support.overlap_ranks import NUM_STEPS, OF_LAYOUT
from tests.support.ranks import run_module

CASES = [
    (layout, name, name.rsplit("_", 1)[0])
    for layout, names in OF_LAYOUT.items()
    for name in names
    if "_" in name
]


@pytest.fixture(scope="module")
def outcomes(
    four_layers: Path, recorded_rollouts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("overlap")
    for ranks in (2, 4):
        paths = (four_layers, recorded_rollouts, out)
        run_module("tests.learner.support.overlap_ranks", *paths, ranks=ranks)
    return {path.stem: torch.load(path, weights_only=False) for path in out.glob("*.pt")}


@pytest.mark.parametrize(("layout", "name", "reference"), CASES)
def test_the_weights_have_the_same_bits(
    layout: str, name: str, reference: str, outcomes: dict[str, Any]
) -> None:
    found, expected = outcomes[f"{layout}.{name}"], outcomes[f"{layout}.{reference}"]
    assert len(found["steps"]) == len(expected["steps"]) == NUM_STEPS
    for one, other in zip(found["steps"], expected["steps"], strict=True):
        assert one["metrics"].keys() == other["metrics"].keys()
        for key, value in other["metrics"].items():
            is_norm = key == "learner/grad_norm"
            assert one["metrics"][key] == (pytest.approx(value, rel=1e-6) if is_norm else value)
        for key, tensor in other["weights"].items():
            assert torch.equal(one["weights"][key], tensor), key
    assert found["goes_on"] and expected["goes_on"]
    first, last = expected["steps"][0]["weights"], expected["steps"][-1]["weights"]
    assert all(not torch.equal(first[key], last[key]) for key in first)


def test_communication_overlaps_in_several_buckets(outcomes: dict[str, Any]) -> None:
    assert outcomes["dp2.bfloat16"]["num_buckets"] == [1]
    assert outcomes["dp2.bfloat16_overlap"]["num_buckets"][0] > 3
    assert outcomes["pp2_vpp2.plain_overlap"]["num_buckets"][0] > 1


@pytest.mark.parametrize("name", ["dp2.plain_offload", "dp2.bfloat16_offload"])
def test_memory_of_gradients_and_optimizer_is_free_meanwhile(
    name: str, outcomes: dict[str, Any]
) -> None:
    found = outcomes[name]
    weights = found["steps"][0]["weights"]
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    # Gradients 4 bytes; moments 8; bfloat16 has main weights too, and both are shared by two ranks.
    expected = {"dp2.plain_offload": 12, "dp2.bfloat16_offload": 4 + 12 / 2}[name] * num_parameters
    assert expected <= found["num_bytes"] < 1.02 * expected
    # For each step one that is taken back, and that, and the step; and the checkpoint.
    assert found["left"] == [0] * (3 * NUM_STEPS + 1)
    assert outcomes["dp2.plain"]["left"] == []
