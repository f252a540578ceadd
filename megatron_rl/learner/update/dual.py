"""The settings of the constraint in, its dual variable out."""

from __future__ import annotations

from megatron_rl.config import ConstraintConfig
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.objective.tolerance import MeasuredTolerance


def build_dual(config: ConstraintConfig) -> DualVariable:
    """lambda as it stands before the first step."""
    measured = None
    # Nobody looks at it before it is measured.
    tolerance = 0.0 if isinstance(config.tolerance, str) else config.tolerance
    if isinstance(config.tolerance, str):
        measured = MeasuredTolerance(config.tolerance_steps, config.tolerance_slack)
    return DualVariable(
        config.initial,
        config.learning_rate,
        tolerance,
        config.minimum,
        config.maximum,
        warmup_steps=config.warmup_steps,
        measured=measured,
    )
