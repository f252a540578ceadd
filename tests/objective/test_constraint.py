import math

import pytest
import torch

from megatron_rl.errors import ConfigError, DataError, DivergenceError
from megatron_rl.objective.constraint import (
    DualVariable,
    gated_discrepancy,
    penalty_ceiling,
    shape_advantages,
)
from megatron_rl.objective.discrepancy import discrepancy


def test_dual_step_worked_by_hand():
    dual = DualVariable(0.1, learning_rate=1.0, tolerance=0.0037, minimum=0.0, maximum=10.0)
    assert dual.update(0.0137) == pytest.approx(0.11, abs=1e-15)
    assert dual.value == pytest.approx(0.11, abs=1e-15)
    assert dual.update(0.0017) == pytest.approx(0.108, abs=1e-15)
    slow = DualVariable(0.05, learning_rate=0.5, tolerance=0.005)
    assert slow.update(0.025) == pytest.approx(0.06, abs=1e-15)


def test_projection_at_both_ends():
    dual = DualVariable(0.002, learning_rate=1.0, tolerance=0.0037)
    assert dual.update(0.0) == 0.0
    assert dual.update(0.0) == 0.0
    dual = DualVariable(9.9, learning_rate=2.0, tolerance=0.0)
    assert dual.update(0.9) == 10.0
    # From the bound it comes back at once: what was cut off is not remembered.
    dual.margin = 0.5
    assert dual.update(0.0) == 9.0


def test_the_ceiling_of_a_step_bounds_lambda_in_this_step_alone():
    dual = DualVariable(1.0, tolerance=0.0, minimum=0.25, maximum=2.0)
    assert dual.update(0.5, ceiling=1.25) == 1.25
    assert dual.update(0.5) == 1.75
    assert dual.update(0.5, ceiling=9.0) == 2.0
    assert dual.update(0.5, ceiling=0.125) == 0.25  # it gives way to the lower bound


def test_the_ceiling_is_a_share_of_the_advantages():
    assert penalty_ceiling(0.02, 0.5) == 0.04
    assert penalty_ceiling(None, 0.5) == penalty_ceiling(0.02, 0.0) == math.inf
    # Where every advantage is 0 any penalty is all that moves the weights.
    assert penalty_ceiling(0.02, None) == penalty_ceiling(0.02, math.nan) == 0.0
    dual = DualVariable(0.5, tolerance=0.0)
    assert dual.update(0.25, ceiling=penalty_ceiling(0.02, math.nan)) == 0.0


def test_equal_engines_only_let_lambda_fall():
    logprobs = torch.tensor([-0.3, -7.0, 0.0])
    delta = discrepancy(logprobs, logprobs)
    advantages = torch.tensor([1.5, -0.25, 0.1])
    dual = DualVariable(0.1, learning_rate=0.8, tolerance=0.004)
    assert delta.tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(shape_advantages(advantages, delta, dual.value), advantages)
    assert dual.update(delta.mean().item()) == pytest.approx(0.1 - 0.8 * 0.004, abs=1e-15)


@pytest.mark.parametrize("mean", [math.nan, math.inf, -math.inf])
def test_a_mean_that_is_not_finite_stops_the_run_and_leaves_lambda(mean):
    dual = DualVariable(0.1)
    with pytest.raises(DivergenceError, match="mean discrepancy"):
        dual.update(mean)
    assert dual.value == 0.1


def test_state_survives_a_checkpoint_bit_for_bit():
    dual = DualVariable(0.1)
    for mean in (0.0123, 0.0091, 0.0044):
        dual.update(mean)
    resumed = DualVariable(0.3)
    resumed.load_state_dict(dual.state_dict())
    assert resumed.value == dual.value
    assert resumed.update(0.0071) == dual.update(0.0071)


def test_loaded_state_is_projected_to_this_runs_bounds():
    dual = DualVariable(0.1, maximum=0.5)
    dual.load_state_dict({"value": 0.75})
    assert dual.value == 0.5
    for state in ({}, {"value": math.nan}):
        with pytest.raises(DataError, match="finite 'value'"):
            dual.load_state_dict(state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"value": -0.1},
        {"value": 11.0},
        {"value": math.nan},
        {"learning_rate": -1.0},
        {"tolerance": -0.001},
        {"tolerance": math.inf},
        {"minimum": -1.0},
        {"minimum": 2.0, "maximum": 1.0},
    ],
)
def test_refuses_settings_that_cannot_work(wrong):
    with pytest.raises(ConfigError, match=r"objective\.constraint"):
        DualVariable(**({"value": 0.1} | wrong))


def test_shaping_worked_by_hand():
    shaped = shape_advantages(
        torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.25, 0.5, 0.0]), dual_value=0.5
    )
    assert shaped.tolist() == [0.875, -1.25, 0.5]


def test_no_gradient_flows_through_delta():
    delta = torch.tensor([0.25], requires_grad=True)
    advantages = torch.tensor([1.0], requires_grad=True)
    shape_advantages(advantages, delta, 0.5).sum().backward()
    assert delta.grad is None
    assert advantages.grad.tolist() == [1.0]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        shape_advantages(torch.zeros(3), torch.zeros(2), 0.1)


def test_warm_up_of_the_dual_step_worked_by_hand():
    dual = DualVariable(0.1, learning_rate=0.8, tolerance=0.0, warmup_steps=4)
    # eta x 1/4, 2/4, 3/4, then all of it.
    expected = 0.1
    for share in (0.25, 0.5, 0.75, 1.0, 1.0):
        expected += 0.8 * share * 0.01
        assert dual.update(0.01) == pytest.approx(expected, abs=1e-15)


def test_gates_worked_by_hand():
    delta = torch.tensor([0.0, 0.25, 0.5, 1.0])
    for gate in ("batch", "mean"):
        assert gated_discrepancy(delta, gate=gate, tolerance=0.25).tolist() == delta.tolist()
    assert gated_discrepancy(delta, gate="token", tolerance=0.25).tolist() == [0, 0, 0.25, 0.75]
    clamped = gated_discrepancy(delta, gate="token", tolerance=0.25, maximum=0.5)
    assert clamped.tolist() == [0, 0, 0.25, 0.25]
    assert gated_discrepancy(delta, maximum=0.5).tolist() == [0, 0.25, 0.5, 0.5]
    # A ratio may exceed 1, and is clipped only if a maximum is given.
    assert gated_discrepancy(4 * delta).tolist() == [0, 1, 2, 4]
    assert gated_discrepancy(4 * delta, maximum=3.0).tolist() == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"constraint\.gate"):
        gated_discrepancy(delta, gate="sequence")
