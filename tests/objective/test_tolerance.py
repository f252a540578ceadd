import math

import pytest

from megatron_rl.errors import ConfigError, DataError, DivergenceError
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.objective.tolerance import CalibratedTolerance


def test_worked_by_hand():
    # Mean 4; deviations -2, 0, 2; variance 8 / 2 = 4; standard error 2 / sqrt(3).
    calibrated = CalibratedTolerance(3, slack=1.5)
    for mean in (0.002, 0.004):
        calibrated.add(mean)
        assert calibrated.value is None
    calibrated.add(0.006)
    assert calibrated.value == pytest.approx(0.004 + 1.5 * 0.002 / math.sqrt(3), rel=1e-12)
    with pytest.raises(ValueError, match="frozen"):
        calibrated.add(0.1)


def test_the_factor_of_the_tolerance():
    calibrated = CalibratedTolerance(3, slack=1.5, factor=0.8)
    for mean in (0.002, 0.004, 0.006):
        calibrated.add(mean)
    assert calibrated.value == pytest.approx(0.8 * (0.004 + 1.5 * 0.002 / math.sqrt(3)), rel=1e-12)
    assert calibrated.measured == pytest.approx(0.004, rel=1e-12)
    with pytest.raises(ConfigError, match="a factor above 0, got 2, 0 and 0"):
        CalibratedTolerance(2, slack=0, factor=0)


def rescaled() -> DualVariable:
    calibration = CalibratedTolerance(2, slack=0.0, factor=0.5)
    return DualVariable(0.1, 1.0, maximum=2.0, calibration=calibration, reference_tolerance=0.004)


def test_lambda_and_its_step_are_converted_to_the_measured_gap():
    dual = rescaled()
    dual.update(0.001)
    dual.update(0.003)
    # The gap is 0.002, half of the reference: lambda and its bound double, eta is four times as
    # large, and lambda * gap is 0.1 * 0.004 as before.
    assert (dual.value, dual.maximum, dual.learning_rate) == pytest.approx((0.2, 4.0, 4.0))
    assert dual.tolerance == pytest.approx(0.001)
    # As 0.1 + (0.006 - 0.002) at the reference: 0.104, doubled.
    assert dual.update(0.003) == pytest.approx(2 * 0.104)
    resumed = rescaled()
    for _ in range(2):  # a second load changes nothing
        resumed.load_state_dict(dual.state_dict())
    assert (resumed.value, resumed.maximum) == (dual.value, dual.maximum)
    assert resumed.update(0.0045) == dual.update(0.0045)
    equal = rescaled()
    equal.update(0.0)
    with pytest.raises(DivergenceError, match="expected a measured gap above 0"):
        equal.update(0.0)


def test_equal_means_are_the_tolerance():
    calibrated = CalibratedTolerance(2, slack=100.0)
    calibrated.add(0.003)
    calibrated.add(0.003)
    assert calibrated.value == 0.003


def test_the_dual_variable_rests_until_its_tolerance_is_calibrated():
    dual = DualVariable(0.1, 1.0, calibration=CalibratedTolerance(2, slack=0.0))
    assert (dual.is_at_rest, dual.effective_value) == (True, 0.0)
    assert dual.update(0.5) == 0.1
    assert (dual.is_at_rest, dual.effective_value) == (True, 0.0)
    assert dual.update(0.25) == 0.1
    assert (dual.is_at_rest, dual.effective_value, dual.tolerance) == (False, 0.1, 0.375)
    assert dual.update(0.5) == pytest.approx(0.1 + 0.125, rel=1e-12)
    assert dual.tolerance == 0.375
    assert dual.num_updates == 1


def test_a_mean_that_is_not_finite_is_not_added():
    dual = DualVariable(0.1, calibration=CalibratedTolerance(2, slack=0.0))
    with pytest.raises(DivergenceError):
        dual.update(math.nan)
    dual.update(0.1)
    assert dual.is_at_rest


@pytest.mark.parametrize("num_before", [0, 1, 2, 3, 4, 5])
def test_a_resumed_run_goes_on_bit_for_bit(num_before):
    def build():
        return DualVariable(0.1, 0.7, warmup_steps=3, calibration=CalibratedTolerance(3, slack=2.0))

    means = (0.0123, 0.0091, 0.0107, 0.0344, 0.0192, 0.0151, 0.0007)
    whole, first, resumed = build(), build(), build()
    expected = [(whole.update(mean), whole.effective_value, whole.tolerance) for mean in means]
    for mean in means[:num_before]:
        first.update(mean)
    resumed.load_state_dict(first.state_dict())
    got = [
        (resumed.update(mean), resumed.effective_value, resumed.tolerance)
        for mean in means[num_before:]
    ]
    # At rest the tolerance has no effect.
    assert [each[:2] for each in got] == [each[:2] for each in expected[num_before:]]
    assert got[-1] == expected[-1]


def test_a_checkpoint_without_a_calibration_is_refused():
    dual = DualVariable(0.1, calibration=CalibratedTolerance(2, slack=0.0))
    with pytest.raises(DataError, match="tolerance=auto"):
        dual.load_state_dict({"value": 0.2, "num_updates": 4})
    with pytest.raises(DataError, match="warmup_steps"):
        DualVariable(0.1, warmup_steps=4).load_state_dict({"value": 0.2})


@pytest.mark.parametrize("wrong", [(1, 2.0), (3, -1.0), (3, math.nan)])
def test_refuses_settings_that_cannot_work(wrong):
    with pytest.raises(ConfigError, match="tolerance_steps"):
        CalibratedTolerance(*wrong)
