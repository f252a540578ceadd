import math

import pytest
import torch

from megatron_rl.errors import ConfigError, DivergenceError
from megatron_rl.objective.discrepancy import (
    MEASURES,
    DiscrepancySum,
    check_logprobs,
    constrained_signal,
    discrepancy,
)

LN2 = math.log(2)


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
    for measure in MEASURES:
        with pytest.raises(ValueError, match="one shape"):
            constrained_signal(torch.zeros(3), torch.zeros(1), measure=measure)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        # rho = 2, 1/4, 1 and e^-30, which is clamped to e^-20
        ("probability", [0.25, 0.375, 0.0, 1.0]),
        ("ratio", [1.0, 0.75, 0.0, 1.0 - math.exp(-20)]),
        ("log_ratio", [LN2, 2 * LN2, 0.0, 30.0]),
    ],
)
def test_every_signal_worked_by_hand(measure, expected):
    recomputed = torch.tensor([-LN2, -3 * LN2, -0.7, -30.0])
    rollout = torch.tensor([-2 * LN2, -LN2, -0.7, 0.0])
    signal = constrained_signal(recomputed, rollout, measure=measure)
    assert signal.dtype == torch.float32
    assert signal.tolist() == pytest.approx(expected, rel=1e-6)
    assert signal[2] == 0.0
    # Of the two policies, neither is the reference of the log-ratio; of the ratio, the engine is.
    mirrored = constrained_signal(rollout, recomputed, measure=measure)
    assert torch.equal(mirrored, signal) == (measure != "ratio")


def test_small_ratios_keep_their_digits_and_large_ones_are_clamped():
    near, far = torch.tensor([-1.0 - 1e-6]), torch.tensor([-31.0])
    exact = math.expm1(-1.0 - near.double().item())
    one = torch.tensor([-1.0])
    assert constrained_signal(one, near, measure="ratio").item() == pytest.approx(exact, rel=1e-6)
    clamped = constrained_signal(one, far, measure="ratio")
    assert clamped.item() == pytest.approx(math.expm1(20), rel=1e-6)


def test_an_unknown_signal():
    with pytest.raises(
        ConfigError, match=r"constraint\.measure: expected one of probability, ratio"
    ):
        constrained_signal(torch.zeros(1), torch.zeros(1), measure="kl")


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


def test_sums_add_up_to_the_mean_of_all_tokens():
    def of(total, num_tokens):
        return DiscrepancySum(
            total=torch.tensor(total, dtype=torch.float64),
            num_tokens=torch.tensor(num_tokens, dtype=torch.float64),
        )

    joined = of(0.25, 2.0) + of(0.0, 0.0) + of(0.5, 1.0)
    assert (joined.total.item(), joined.num_tokens.item()) == (0.75, 3.0)
    assert joined.mean == 0.25
    assert math.isnan(of(0.0, 0.0).mean)
