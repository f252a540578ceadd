"""What the learner gives out as Hugging Face tensors, from every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.learner.support.parity_cases import BFLOAT16_CASES, CASES, MOE_CASES, Case
from tests.learner.support.parity_models import MODELS

PAIRS = [
    (model, case)
    for case in (*CASES, *BFLOAT16_CASES, *MOE_CASES)
    for model in case.models or MODELS
]


@pytest.mark.parametrize(
    ("model", "case"), PAIRS, ids=[f"{model}-{case.name}" for model, case in PAIRS]
)
def test_loaded_and_exported_is_bit_equal(
    model: str, case: Case, outcome_of: Any, parity_folder: Path
) -> None:
    outcome = outcome_of(model, case.name)
    checkpoint = load_file(parity_folder / model / "model.safetensors")
    exported = outcome["weights_before"]
    assert exported.keys() == checkpoint.keys()
    for name, tensor in checkpoint.items():
        expected = tensor.to(getattr(torch, case.dtype))
        assert exported[name].dtype is expected.dtype, name
        assert torch.equal(exported[name], expected), name


@pytest.mark.parametrize(
    ("model", "case"), PAIRS, ids=[f"{model}-{case.name}" for model, case in PAIRS]
)
def test_comes_in_layer_order_as_announced(model: str, case: Case, outcome_of: Any) -> None:
    outcome = outcome_of(model, case.name)
    found = [(name, tuple(tensor.shape)) for name, tensor in outcome["weights_after"].items()]
    assert found == outcome["names"]
    layers = [int(name.split(".")[2]) for name, _ in found if ".layers." in name]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1, 2, 3}
