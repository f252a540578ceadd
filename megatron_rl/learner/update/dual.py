"""The settings of the constraint in, its dual variable out."""

from __future__ import annotations

from megatron_rl.config import ConstraintConfig
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.objective.tolerance import CalibratedTolerance


def build_dual(config: ConstraintConfig) -> DualVariable:
    """lambda before the first step."""
    calibration = None
    tolerance = config.tolerance
    if isinstance(tolerance, str):
        calibration = CalibratedTolerance(config.tolerance_steps, config.tolerance_slack)
        tolerance = 0.0  # placeholder until the tolerance is calibrated
    return DualVariable(
        config.initial,
        config.learning_rate,
        tolerance,
        config.minimum,
        config.maximum,
        warmup_steps=config.warmup_steps,
        calibration=calibration,
    )
