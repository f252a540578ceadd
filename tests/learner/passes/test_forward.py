"""Packed rows through Megatron's schedule: temperature, entropy, borders, and that the forward-only
pass and the training pass are the same arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.errors import DataError
from megatron_rl.learner.passes import forward
from megatron_rl.learner.passes.forward import WHOLE, RowOutput, evaluate_rows
from megatron_rl.ops import broken_rows
from tests.learner.support.parity_cases import BFLOAT16_CASES, Case
from tests.learner.support.parity_cases import CASES as ALL_CASES
from tests.learner.support.parity_models import MODELS

PAIRS = [(model, case) for case in (*ALL_CASES, *BFLOAT16_CASES) for model in case.models or MODELS]
COOLED = [
    (model, case.name)
    for model, case in PAIRS
    if case.name in ("tp1", "tp2_unpacked", "pp2", "dp2", "tp2_pp2")
]


@pytest.mark.parametrize(("model", "case"), COOLED)
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


@pytest.mark.parametrize(
    ("model", "case"), PAIRS, ids=[f"{model}-{case.name}" for model, case in PAIRS]
)
def test_the_policy_starts_bit_equal_to_the_recomputation(
    model: str, case: Case, outcome_of: Any
) -> None:
    """So `recompute=auto` may save the separate pass, and the first ratio is exactly 1."""
    is_same = outcome_of(model, case.name)["is_same"]
    assert is_same == (True,) * case.world_size


@pytest.mark.parametrize(
    ("model", "case"), PAIRS, ids=[f"{model}-{case.name}" for model, case in PAIRS]
)
def test_only_the_last_stage_has_logprobs(model: str, case: Case, outcome_of: Any) -> None:
    with_logprobs = [
        bool(of_rank["logprobs"]) for of_rank in outcome_of(model, case.name)["forward"]
    ]
    assert sum(with_logprobs) == case.world_size // case.pipeline


def test_no_rows_no_pass() -> None:
    assert evaluate(None, []) == []


def evaluate(model: Any, rows: list[Any]) -> list[torch.Tensor]:
    return evaluate_rows(
        model,
        rows,
        RowOutput.recomputed_row,
        temperature=1.0,
        truncation=WHOLE,
        vocab_size=8,
        parallel=SimpleNamespace(device=torch.device("cpu")),
        name="recomputation",
    )


def test_a_pass_ends_with_the_check_for_broken_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = torch.tensor([broken_rows.NO_ROW])
    monkeypatch.setitem(broken_rows._FLAGS, torch.device("cpu"), flag)
    monkeypatch.setattr(forward, "run_schedule", lambda *given, **settings: ["logprobs"])
    assert evaluate(None, ["row"]) == ["logprobs"]
    flag.fill_(2 * 4)
    with pytest.raises(DataError, match="recomputation: label of row 4"):
        evaluate(None, ["row"])


def test_rows_take_their_own_logprobs_from_an_output() -> None:
    logprobs = torch.tensor([-0.5, -1.0], requires_grad=True)
    full_logprobs = torch.tensor([-0.7, -1.5], requires_grad=True)
    output = RowOutput(
        logprobs=logprobs,
        full_logprobs=full_logprobs,
        entropy=torch.zeros(2),
        is_outside_support=torch.zeros(2, dtype=torch.bool),
    )
    recomputed, full = output.recomputed_row("row"), output.full_row("row")
    assert recomputed.micro_batch == full.micro_batch == "row"
    assert torch.equal(recomputed.recomputed_logprobs, logprobs)
    assert torch.equal(full.full_logprobs, full_logprobs)
    assert not recomputed.recomputed_logprobs.requires_grad
    assert not full.full_logprobs.requires_grad
    assert recomputed.recomputed_head_logprobs is None
    head = torch.tensor([[-0.5, -2.0], [0.0, 0.0]], requires_grad=True)
    recomputed = replace(output, head_logprobs=head).recomputed_row("row")
    assert torch.equal(recomputed.recomputed_head_logprobs, head)
    assert not recomputed.recomputed_head_logprobs.requires_grad
