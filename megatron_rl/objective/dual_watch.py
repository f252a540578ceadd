"""Watches the dual variable lambda for two signs that its penalty does not close the gap.

    at the bound:     lambda has been at its upper bound after each of the last n dual steps
    without effect:   lambda has grown in each of the last n dual steps, and the mean gap of the
                      second half of them is not below that of the first by more than two standard
                      errors of the difference

A gap that follows the learner, as that of a rounded engine does, cannot be trained away: lambda
then grows until its penalty outweighs the reward (docs/discrepancy-study.md).
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from megatron_rl.errors import ConfigError

_CHANGE = (
    "raise objective.constraint.tolerance above the gap (auto measures it), count it from the gap "
    "of fresh weights (tolerance_above=fresh_gap), or make the gap smaller (a finer "
    "rollout.quantization.format, weights that are published more often, a lower learning rate)"
)


class DualWatch:
    """Counts the steps of both signs. Ranks that add the same floats hold the same counts."""

    def __init__(self, num_steps: int) -> None:
        """
        Args:
            num_steps: n, at least 4.
        """
        if num_steps < 4:
            raise ConfigError(
                f"objective.constraint.warn_after_steps: expected 0 (never) or at least 4, "
                f"got {num_steps}"
            )
        self.num_steps = num_steps
        self.num_at_maximum = 0  # steps in a row after which lambda was at its upper bound
        self.num_growing = 0  # steps in a row in which lambda grew
        self._grown: list[tuple[float, float]] = []  # of the last n of them: lambda before, the gap

    def add(self, before: float, after: float, *, gap: float, maximum: float) -> None:
        """Add one dual step.

        Args:
            before, after: lambda. gap: the mean of the constrained signal. maximum: lambda's bound.
        """
        is_held = after >= maximum > 0.0  # at a bound of 0 there is nothing to hold back
        self.num_at_maximum = self.num_at_maximum + 1 if is_held else 0
        if after > before:
            self.num_growing += 1
            self._grown = [*self._grown, (before, gap)][-self.num_steps :]
        else:
            self.num_growing, self._grown = 0, []

    @property
    def is_at_maximum(self) -> bool:
        """Whether lambda has been at its upper bound for n steps."""
        return self.num_at_maximum >= self.num_steps

    @property
    def is_without_effect(self) -> bool:
        """Whether lambda has grown for n steps while the gap did not fall."""
        if self.num_growing < self.num_steps:
            return False
        first, second = self._halves()
        variances = (statistics.variance(first) + statistics.variance(second)) / len(first)
        fall = statistics.fmean(first) - statistics.fmean(second)
        return fall <= 2 * math.sqrt(variances)

    def _halves(self) -> tuple[list[float], list[float]]:
        gaps = [gap for _, gap in self._grown]
        half = len(gaps) // 2
        return gaps[:half], gaps[-half:]

    def metrics(self) -> dict[str, float]:
        """`constraint/num_steps_at_maximum`, `constraint/num_steps_growing`, and
        `constraint/is_ineffective`, 1 while one of the two signs is there.
        """
        return {
            "constraint/num_steps_at_maximum": float(self.num_at_maximum),
            "constraint/num_steps_growing": float(self.num_growing),
            "constraint/is_ineffective": float(self.is_at_maximum or self.is_without_effect),
        }

    def warning(self, value: float, tolerance: float) -> str | None:
        """The line for the console in the n-th step of a sign, the 2n-th, and so on; None in other
        steps.

        Args:
            value: lambda after the last step. tolerance: c.
        """
        if self.is_at_maximum and self.num_at_maximum % self.num_steps == 0:
            return (
                f"warning: lambda has been at its upper bound of {value:g} for "
                f"{self.num_at_maximum} steps, and the gap is still above the tolerance of "
                f"{tolerance:.3g}: the penalty cannot close this gap, and at this bound it may "
                f"outweigh the reward (constraint/penalty_share/mean); {_CHANGE}, and lower "
                "objective.constraint.maximum or max_penalty_share"
            )
        if self.is_without_effect and self.num_growing % self.num_steps == 0:
            first, second = self._halves()
            return (
                f"warning: lambda has grown in each of the last {self.num_growing} steps, lately "
                f"from {self._grown[0][0]:.3g} to {value:.3g}, and the gap has not fallen (means "
                f"of {statistics.fmean(first):.3g} and {statistics.fmean(second):.3g}, tolerance "
                f"{tolerance:.3g}): the penalty does not act on this gap, and will outweigh the "
                f"reward as lambda goes on; {_CHANGE}, or bound lambda by "
                "objective.constraint.max_penalty_share"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """The counts and the last steps of growth, as plain JSON values."""
        return {
            "num_at_maximum": self.num_at_maximum,
            "num_growing": self.num_growing,
            "grown": [list(each) for each in self._grown],
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue a checkpoint's counts. They start at 0 if its run did not count; with a larger n
        than that run's, growth counts the steps whose gaps were kept.
        """
        if state is None:
            return
        self.num_at_maximum = int(state["num_at_maximum"])
        self._grown = [(float(value), float(gap)) for value, gap in state["grown"]]
        self._grown = self._grown[-self.num_steps :]
        self.num_growing = int(state["num_growing"])
        if len(self._grown) < min(self.num_growing, self.num_steps):
            self.num_growing = len(self._grown)
