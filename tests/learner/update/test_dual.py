from megatron_rl.config import ConstraintConfig
from megatron_rl.learner.update.dual import build_dual


def test_every_setting_arrives():
    config = ConstraintConfig(
        initial=0.3, learning_rate=0.5, tolerance=0.01, minimum=0.2, maximum=4.0, warmup_steps=7
    )
    dual = build_dual(config)
    assert (dual.value, dual.learning_rate, dual.tolerance) == (0.3, 0.5, 0.01)
    assert (dual.minimum, dual.maximum, dual.warmup_steps) == (0.2, 4.0, 7)
    assert dual.calibration is None


def test_an_automatic_tolerance_is_calibrated():
    dual = build_dual(
        ConstraintConfig(tolerance="auto", tolerance_steps=4, tolerance_slack=3.0, warmup_steps=2)
    )
    assert dual.is_at_rest and dual.effective_value == 0.0
    assert (dual.calibration.num_steps, dual.calibration.slack, dual.warmup_steps) == (4, 3.0, 2)
