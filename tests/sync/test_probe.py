from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.probe import check_parity

FLOAT32 = {"engine_dtype": "float32", "learner_dtype": "float32", "tolerance": 0.0}
BFLOAT16 = {"engine_dtype": "bfloat16", "learner_dtype": "float32", "tolerance": 0.0}


def test_report_by_hand():
    engine = torch.tensor([math.log(0.5), math.log(0.2), -4.0])
    learner = torch.tensor([math.log(0.53), math.log(0.2), -4.4])
    report = check_parity(engine, learner, **BFLOAT16)
    assert report.num_tokens == 3
    gaps = [0.03, 0.0, math.exp(-4.0) - math.exp(-4.4)]
    assert report.mean_probability_gap == pytest.approx(sum(gaps) / 3, rel=1e-5)
    assert report.max_probability_gap == pytest.approx(0.03, rel=1e-5)
    assert report.max_relative_logprob_gap == pytest.approx(0.4 / 4.4, rel=1e-5)


@pytest.mark.parametrize("logprob", [-0.001, -0.7, -12.0])
def test_float32_bound_is_relative_above_one(logprob):
    engine = torch.full((48,), -1.0, dtype=torch.float64)
    engine[17] = logprob
    scale = 2e-5 * max(1.0, abs(logprob))
    for factor, is_fine in ((0.9, True), (-0.9, True), (1.1, False), (-1.1, False)):
        learner = engine.clone()
        learner[17] += factor * scale
        if is_fine:
            check_parity(engine, learner, **FLOAT32)
        else:
            with pytest.raises(SyncError, match="does not serve the published weights"):
                check_parity(engine, learner, **FLOAT32)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf, -9999.0, -10000.0])
@pytest.mark.parametrize("side", ["engine", "learner"])
def test_values_that_are_no_logprobs(bad, side):
    engine, learner = torch.full((4,), -1.0), torch.full((4,), -1.0)
    (engine if side == "engine" else learner)[2] = bad
    with pytest.raises(SyncError, match=f"the {side} gave .* for token 2 of 4"):
        check_parity(engine, learner, engine_dtype="int8", learner_dtype="float32", tolerance=1e9)


def test_a_given_tolerance_is_of_the_mean_probability_gap():
    engine, learner = torch.full((4,), math.log(0.5)), torch.full((4,), math.log(0.51))
    check_parity(engine, learner, engine_dtype="float32", learner_dtype="float32", tolerance=0.011)
    with pytest.raises(SyncError, match=r"mean \|p - p\| of at most 0\.009"):
        check_parity(
            engine, learner, engine_dtype="float32", learner_dtype="float32", tolerance=0.009
        )


@pytest.mark.parametrize(("first", "second"), [((3,), (4,)), ((2, 2), (2, 2)), ((0,), (0,))])
def test_shapes(first, second):
    with pytest.raises(SyncError, match="parity probe: expected"):
        check_parity(torch.zeros(first), torch.zeros(second), **FLOAT32)
