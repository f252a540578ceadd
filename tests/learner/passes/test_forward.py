"""Packed rows through Megatron's schedule: temperature, entropy, borders."""

from __future__ import annotations

from typing import Any

import pytest

from tests.learner.parity_models import MODELS

CASES = ("tp1", "tp2_unpacked", "pp2", "dp2", "tp2_pp2")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("what", ["cool_logprobs", "cool_entropy"])
def test_at_a_temperature_below_one(
    model: str, case: str, what: str, outcome_of: Any, reference_of: Any
) -> None:
    expected = reference_of(model)[what]
    seen = set()
    for of_rank in outcome_of(model, case)["forward"]:
        for number, values in of_rank[what].items():
            seen.add(number)
            scale = expected[number].abs().clamp(min=1.0)
            error = ((values - expected[number]).abs() / scale).max().item()
            # Division by 0.7 widens the logits' errors as it widens the logits.
            assert error <= 3e-5, f"sequence {number}: {error:.2e}"
    assert seen == set(range(len(expected)))
