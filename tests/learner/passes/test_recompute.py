"""The forward-only pass and the training pass are the same arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rl.learner.passes.recompute import recompute_logprobs
from tests.learner.parity_models import MODELS
from tests.learner.parity_ranks import BFLOAT16_CASES, CASES, Case

PAIRS = [(model, case) for case in (*CASES, *BFLOAT16_CASES) for model in case.models or MODELS]


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
    rows = recompute_logprobs(None, [], temperature=1.0, vocab_size=8, parallel=None)
    assert rows == []
