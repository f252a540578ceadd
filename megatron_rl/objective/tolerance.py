"""The tolerance of the constraint, calibrated from the mean gaps of the first steps.

    c = factor * (mean(delta_bar) + slack * s / sqrt(K))

The mean is over the first K steps; s is the standard deviation of the K means, with K - 1 in the
denominator. During these steps lambda is at rest and nothing acts on the gap; then c is frozen. The
paper (arXiv 2606.08779) sets c by hand for each model and leaves the automatic choice open.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_rl.errors import ConfigError, DataError


class CalibratedTolerance:
    """The tolerance c, which is known after `num_steps` means have been added. Ranks that add the
    same floats hold the same bits.
    """

    def __init__(self, num_steps: int, slack: float, factor: float = 1.0) -> None:
        """
        Args:
            num_steps: K, at least 2.
            slack: in standard errors of the mean, at least 0.
            factor: of the tolerance, above 0; below 1 the gap is to shrink.
        """
        if num_steps < 2 or not 0 <= slack < math.inf or not 0 < factor < math.inf:
            raise ConfigError(
                "calibrated tolerance: expected at least 2 steps, a slack of at least 0 and a "
                f"factor above 0, got {num_steps}, {slack} and {factor}; change "
                "objective.constraint.tolerance_steps, tolerance_slack or tolerance_factor"
            )
        self.num_steps = num_steps
        self.slack = float(slack)
        self.factor = float(factor)
        self.value: float | None = None  # c; None until enough means have been added
        self._means: list[float] = []

    def add(self, mean_discrepancy: float) -> None:
        """Add one step's global mean gap. The last of the `num_steps` means freezes the tolerance.

        Raises:
            ValueError: the tolerance is already frozen.
        """
        if self.value is not None:
            raise ValueError("calibrated tolerance: expected no further mean, it is frozen")
        self._means.append(mean_discrepancy)
        if len(self._means) >= self.num_steps:
            self.value = self._calibrate()

    def _calibrate(self) -> float:
        count, mean = len(self._means), self.measured
        variance = math.fsum((each - mean) ** 2 for each in self._means) / (count - 1)
        return self.factor * (mean + self.slack * math.sqrt(variance / count))

    @property
    def measured(self) -> float:
        """The mean of the gaps that were added, at least one."""
        return math.fsum(self._means) / len(self._means)

    def state_dict(self) -> dict[str, Any]:
        """The tolerance and the means added so far, as plain JSON values."""
        return {"value": self.value, "means": list(self._means)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue a checkpoint's calibration. A frozen tolerance does not change.

        Raises:
            DataError: the checkpoint contains no calibration.
        """
        if state is None or "value" not in state or "means" not in state:
            raise DataError(
                "calibrated tolerance: expected a checkpoint of a run with "
                f"objective.constraint.tolerance=auto, got {state}; give the tolerance as a number"
            )
        self.value = None if state["value"] is None else float(state["value"])
        self._means = [float(each) for each in state["means"]]
