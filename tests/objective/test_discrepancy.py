import math

import pytest
import torch

from megatron_rl.errors import DivergenceError
from megatron_rl.objective.discrepancy import (
    check_logprobs,
    discrepancy,
    discrepancy_metrics,
)
from megatron_rl.observe.metrics import reduce

LN2 = math.log(2)


def _alone(tensor: torch.Tensor, _operation: str) -> torch.Tensor:
    return tensor


def test_numbers_worked_by_hand():
    # 1/2 - 1/4, 1/8 - 1/2, equal ones, and a token that one engine cannot produce.
    recomputed = torch.tensor([-LN2, -3 * LN2, -0.7, -math.inf])
    rollout = torch.tensor([-2 * LN2, -LN2, -0.7, 0.0])
    delta = discrepancy(recomputed, rollout)
    assert delta.dtype == torch.float32
    assert delta.tolist() == pytest.approx([0.25, 0.375, 0.0, 1.0], rel=1e-6)
    assert delta[2] == 0.0


def test_probabilities_near_one_keep_their_difference():
    recomputed = torch.tensor([-1e-7])
    rollout = torch.tensor([-1.001e-7])
    expected = float(recomputed.double().exp() - rollout.double().exp())
    assert discrepancy(recomputed, rollout).item() == pytest.approx(expected, rel=1e-6)
    assert expected > 0


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_any_shape(shape):
    assert discrepancy(torch.zeros(shape), torch.full(shape, -1.0)).shape == shape


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        discrepancy(torch.zeros(3), torch.zeros(1))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, -9999.0, -12000.0, 123.0])
def test_a_broken_logprob_is_named(broken):
    logprobs = torch.tensor([-0.5, -20.0, broken, -1.0])
    mask = torch.tensor([True, True, True, False])
    with pytest.raises(DivergenceError, match=r"rollout log-prob at position 2: .*1 of 3 kept"):
        check_logprobs(logprobs, mask, name="rollout log-prob")
    check_logprobs(logprobs, torch.tensor([True, True, False, True]))


def test_the_worst_of_several_is_named():
    mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(DivergenceError, match="position 1"):
        check_logprobs(torch.tensor([-9999.0, -20000.0, -1.0, -9999.0]), mask)
    with pytest.raises(DivergenceError, match=r"position 3.*nan"):
        check_logprobs(torch.tensor([-9999.0, -math.inf, -1.0, math.nan]), mask)


def test_rounding_above_zero_and_empty_rows_are_no_error():
    check_logprobs(torch.tensor([1e-7, -9998.0]), torch.ones(2, dtype=torch.bool))
    check_logprobs(torch.zeros(0), torch.zeros(0, dtype=torch.bool))


def test_metrics_worked_by_hand():
    # p_train 1/2, 1/8, 1/4; p_inf 1/4, 1/4, 1/4; the fourth is masked and must not matter.
    recomputed = torch.tensor([-LN2, -3 * LN2, -2 * LN2, math.nan])
    rollout = torch.tensor([-2 * LN2, -2 * LN2, -2 * LN2, -math.inf])
    mask = torch.tensor([True, True, True, False])
    versions = torch.tensor([7, 6, 3, -1])
    reduced = reduce(discrepancy_metrics(recomputed, rollout, mask, versions, 7), _alone)
    expected = {
        "discrepancy/mean": (0.25 + 0.125 + 0.0) / 3,
        "discrepancy/max": 0.25,
        "discrepancy/age_0/mean": 0.25,
        "discrepancy/age_1/mean": 0.125,
        "discrepancy/age_2_plus/mean": 0.0,
        "discrepancy/age/mean": (0 + 1 + 4) / 3,
        "discrepancy/probability_difference/mean": (0.25 - 0.125) / 3,
        "discrepancy/log_ratio/mean": 0.0,
        "discrepancy/kl_k1/mean": 0.0,
        "discrepancy/kl_k3/mean": ((2 - 1 - LN2) + (0.5 - 1 + LN2)) / 3,
        "discrepancy/mult_prob_error/mean": (2 + 2 + 1) / 3,
    }
    quantiles = {"discrepancy/q50", "discrepancy/q90", "discrepancy/q99"}
    assert set(reduced) == set(expected) | quantiles
    for name, value in expected.items():
        assert reduced[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    assert 0.1 <= reduced["discrepancy/q50"] <= 0.15
    assert 0.2 <= reduced["discrepancy/q99"] <= 0.3


def test_log_ratios_are_clamped_before_exp():
    mask = torch.tensor([True])
    metrics = discrepancy_metrics(
        torch.tensor([-500.0]), torch.tensor([-0.1]), mask, torch.tensor([0]), 0
    )
    reduced = reduce(metrics, _alone)
    assert reduced["discrepancy/mult_prob_error/mean"] == pytest.approx(math.exp(20))
    assert reduced["discrepancy/kl_k1/mean"] == 20.0
    assert reduced["discrepancy/log_ratio/mean"] == pytest.approx(-499.9, rel=1e-6)


def test_an_empty_mask_has_the_same_keys_and_no_values():
    empty = discrepancy_metrics(
        torch.zeros(3),
        torch.zeros(3),
        torch.zeros(3, dtype=torch.bool),
        torch.full((3,), -1),
        4,
    )
    full = discrepancy_metrics(
        torch.zeros(3), torch.zeros(3), torch.ones(3, dtype=torch.bool), torch.full((3,), 4), 4
    )
    assert set(empty) == set(full)
    assert reduce(empty, _alone) == {}


def test_mean_is_of_the_delta_that_shapes():
    torch.manual_seed(0)
    recomputed, rollout = -torch.rand(1000) * 5, -torch.rand(1000) * 5
    mask = torch.rand(1000) < 0.5
    metrics = discrepancy_metrics(
        recomputed, rollout, mask, torch.zeros(1000, dtype=torch.int64), 0
    )
    expected = discrepancy(recomputed, rollout)[mask].double()
    assert float(metrics["discrepancy/mean"].sum) == expected.sum().item()
    assert float(metrics["discrepancy/mean"].count) == mask.sum().item()
