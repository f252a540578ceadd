"""The mean gap of a step comes in, the penalty that shapes the next step's advantages goes out
(DCMDP, arXiv 2606.08779).

Maximise reward subject to `E[delta] <= c`. Its Lagrangian has one dual variable,
`lambda <- clip(lambda + eta * (delta_bar - c), lambda_min, lambda_max)`, stepped once a training
step, and shapes every token's advantage, `A'[t] = A[t] - lambda * delta[t]`. The lambda that shapes
a batch is the one from before that batch's dual step.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.errors import ConfigError, DataError, DivergenceError

_WHERE = "change it under objective.constraint"


class DualVariable:
    """lambda: a Python float, so every rank that feeds the same mean holds the same bits."""

    def __init__(
        self,
        value: float,
        learning_rate: float = 1.0,
        tolerance: float = 0.0037,
        minimum: float = 0.0,
        maximum: float = 10.0,
    ) -> None:
        """
        Args:
            value: lambda before the first step, within [minimum, maximum].
            learning_rate: eta, at least 0 (0 keeps lambda fixed).
            tolerance: c, the mean gap in probability that is allowed, at least 0.
            minimum, maximum: where lambda is projected to; 0 <= minimum <= maximum.

        Raises:
            ConfigError: a value outside these.
        """
        for name, number in (
            ("initial", value),
            ("learning_rate", learning_rate),
            ("tolerance", tolerance),
            ("minimum", minimum),
            ("maximum", maximum),
        ):
            if not math.isfinite(number) or number < 0:
                raise ConfigError(
                    f"dual variable's {name}: expected a finite number of at least 0, "
                    f"got {number}; {_WHERE}"
                )
        if not minimum <= value <= maximum:
            raise ConfigError(
                f"dual variable: expected minimum <= initial <= maximum, "
                f"got {minimum}, {value}, {maximum}; {_WHERE}"
            )
        self.value = float(value)
        self.learning_rate = float(learning_rate)
        self.tolerance = float(tolerance)
        self.minimum = float(minimum)
        self.maximum = float(maximum)

    def update(self, mean_discrepancy: float) -> float:
        """One dual step from the global batch's mean gap; returns the new lambda.

        Raises:
            DivergenceError: the mean is not finite; lambda is left as it was.
        """
        mean_discrepancy = float(mean_discrepancy)
        if not math.isfinite(mean_discrepancy):
            raise DivergenceError(
                f"dual step: expected a finite mean discrepancy, got {mean_discrepancy}; "
                "the batch holds a log-prob that is not finite, or no response token at all"
            )
        stepped = self.value + self.learning_rate * (mean_discrepancy - self.tolerance)
        self.value = self._project(stepped)
        return self.value

    def state_dict(self) -> dict[str, float]:
        """What changes while training; the other numbers are settings and come from the config."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take lambda from a checkpoint, projected to the bounds of this run's config.

        Raises:
            DataError: no value, or one that is not finite.
        """
        value = float(state.get("value", math.nan))
        if not math.isfinite(value):
            raise DataError(
                f"dual variable: expected a checkpoint with a finite 'value', got {state}"
            )
        self.value = self._project(value)

    def _project(self, value: float) -> float:
        return min(max(value, self.minimum), self.maximum)

    def __repr__(self) -> str:
        return (
            f"DualVariable(value={self.value}, learning_rate={self.learning_rate}, "
            f"tolerance={self.tolerance}, minimum={self.minimum}, maximum={self.maximum})"
        )


def shape_advantages(
    advantages: torch.Tensor, discrepancy: torch.Tensor, dual_value: float
) -> torch.Tensor:
    """`A' = A - lambda * delta`, token by token; no gradient flows through delta.

    Args:
        advantages: [T] float32.
        discrepancy: [T] float32, `|p_train - p_inf|`.
        dual_value: lambda from before this batch's dual step.

    Returns:
        [T] float32; equal to `advantages` bit for bit where delta or lambda is 0.
    """
    if advantages.shape != discrepancy.shape:
        raise ValueError(
            f"shape_advantages: expected advantages and discrepancy of one shape, "
            f"got {tuple(advantages.shape)} and {tuple(discrepancy.shape)}"
        )
    return advantages - dual_value * discrepancy.detach()
