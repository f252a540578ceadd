"""The constraint on the discrepancy, its dual variable lambda, and the penalty whose coefficient is
lambda (DCMDP, arXiv 2606.08779).

The problem is to maximise the reward subject to `E[delta] <= c`. Its Lagrangian has one dual
variable, which is updated once per training step:
`lambda <- clip(lambda + eta * (delta_bar - c), lambda_min, lambda_max)`. Lambda is the coefficient
of a penalty on every token, which has one of two kinds:

    shaping:         A'[t] = A[t] - lambda * g(delta[t]),   no gradient through delta
    differentiable:  loss[t] + lambda * x(p_theta[t], p_inf[t]), gradient through p_theta

where delta is |p_train - p_inf| or another signal (`discrepancy.constrained_signal`), and g(delta)
= delta, or max(delta - c, 0) with gate=token. The forms of x are those of penalty.py. The penalty
of a batch uses the lambda from before that batch's dual step.

Shaping lowers the advantages by lambda * mean g on average. On the policy's own samples this offset
has no gradient in expectation; on samples from other weights it pushes the policy away from them. A
baseline, which replaces g(delta[t]) by g(delta[t]) - mean g, removes this push. Even with a
baseline, delta has no sign: shaping lowers a token's probability even where p_train is already
below p_inf, while the differentiable penalty raises it there.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch

from megatron_rl.config.choices import Gate
from megatron_rl.errors import ConfigError, DataError, DivergenceError
from megatron_rl.objective.dual_watch import DualWatch
from megatron_rl.objective.fresh_gap import FreshGap
from megatron_rl.objective.tolerance import CalibratedTolerance

GATES = get_args(Gate)
_WHERE = "change it under objective.constraint"


class DualVariable:
    """The dual variable lambda. It is a Python float, so that ranks which update it with the same
    mean hold the same bits.

    While its tolerance is being calibrated, lambda is at rest: `effective_value` is 0, and `update`
    passes the mean to the calibration and does not change lambda.
    """

    def __init__(
        self,
        value: float,
        learning_rate: float = 1.0,
        tolerance: float = 0.0037,
        minimum: float = 0.0,
        maximum: float = 10.0,
        *,
        warmup_steps: int = 0,
        calibration: CalibratedTolerance | None = None,
        reference_tolerance: float | None = None,
        fresh_gap: FreshGap | None = None,
        watch: DualWatch | None = None,
    ) -> None:
        """
        Args:
            value: lambda before the first step, within [minimum, maximum].
            learning_rate: eta, at least 0 (0 keeps lambda fixed).
            tolerance: c, the mean of the constrained signal that is allowed, at least 0.
            minimum, maximum: the interval that lambda is projected to; 0 <= minimum <= maximum.
            warmup_steps: dual steps over which eta rises linearly to `learning_rate`; 0: none.
            calibration: replaces `tolerance` by one that is calibrated over the first steps.
            reference_tolerance: the gap that the values above are given for. When the calibration
                has measured one, lambda and its bounds are multiplied by reference / measured, and
                eta by the square of it, so that lambda * gap moves as it would there. None: they
                are taken as they are.
            fresh_gap: the tolerance counts from it; None: from 0.
            watch: counts the steps in which the constraint has no effect; None: nothing does.

        Raises:
            ConfigError: a value is outside its range.
        """
        for name, number in (
            ("initial", value),
            ("learning_rate", learning_rate),
            ("tolerance", tolerance),
            ("minimum", minimum),
            ("maximum", maximum),
            ("warmup_steps", warmup_steps),
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
        self.margin = float(tolerance)  # the tolerance, without the gap of fresh weights
        self.minimum = float(minimum)
        self.maximum = float(maximum)
        self._given = (self.learning_rate, self.minimum, self.maximum)
        self.warmup_steps = warmup_steps
        self.calibration = calibration
        self.reference_tolerance = reference_tolerance
        self.fresh_gap = fresh_gap
        self.watch = watch
        self.num_updates = 0  # dual steps so far, without the updates at rest

    @property
    def tolerance(self) -> float:
        """The mean of the signal that is allowed in the next step."""
        return self.margin if self.fresh_gap is None else self.margin + self.fresh_gap.value

    @property
    def calibrated_tolerance(self) -> float | None:
        """The tolerance that the first steps have measured; None: not yet, or it was given."""
        return None if self.calibration is None else self.calibration.value

    @property
    def is_at_rest(self) -> bool:
        """Whether the tolerance is still being calibrated."""
        return self.calibration is not None and self.calibration.value is None

    @property
    def effective_value(self) -> float:
        """The coefficient of the next batch's penalty: lambda, or 0 at rest."""
        return 0.0 if self.is_at_rest else self.value

    def update(self, mean_discrepancy: float, *, ceiling: float = math.inf) -> float:
        """Take one dual step with the global batch's mean gap, or, at rest, one step of the
        calibration. Returns the new lambda.

        Args:
            ceiling: a further upper bound, of this step alone; it gives way to the lower bound.

        Raises:
            DivergenceError: the mean is not finite; lambda is unchanged.
        """
        mean_discrepancy = float(mean_discrepancy)
        if not math.isfinite(mean_discrepancy):
            raise DivergenceError(
                f"dual step: expected a finite mean discrepancy, got {mean_discrepancy}; "
                "the batch holds a log-prob that is not finite, or no response token at all"
            )
        if self.calibration is not None and self.calibration.value is None:
            self.calibration.add(mean_discrepancy)
            if self.calibration.value is not None:
                self.value *= self._adopt(self.calibration, self.calibration.value)
            return self.value
        self.num_updates += 1
        rate = self.learning_rate
        if self.num_updates < self.warmup_steps:
            rate *= self.num_updates / self.warmup_steps
        before = self.value
        self.value = self._project(before + rate * (mean_discrepancy - self.tolerance), ceiling)
        if self.watch is not None:
            maximum = self._project(math.inf, ceiling)
            self.watch.add(before, self.value, gap=mean_discrepancy, maximum=maximum)
        return self.value

    def warning(self) -> str | None:
        """The line for the console if the constraint has had no effect for long, see DualWatch."""
        return None if self.watch is None else self.watch.warning(self.value, self.tolerance)

    def state_dict(self) -> dict[str, Any]:
        """The values that change during training, as plain JSON; the rest comes from the config."""
        state: dict[str, Any] = {"value": self.value, "num_updates": self.num_updates}
        if self.calibration is not None:
            state["tolerance"] = self.calibration.state_dict()
        if self.fresh_gap is not None:
            state["fresh_gap"] = self.fresh_gap.state_dict()
        if self.watch is not None:
            state["watch"] = self.watch.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore lambda from a checkpoint, projected to the bounds of this run's config, and the
        calibration of the tolerance.

        Raises:
            DataError: lambda is missing or not finite; or this run has a warm-up or a calibrated
                tolerance, and the checkpoint does not contain its state.
        """
        value = float(state.get("value", math.nan))
        if not math.isfinite(value):
            raise DataError(
                f"dual variable: expected a checkpoint with a finite 'value', got {state}"
            )
        if self.warmup_steps and "num_updates" not in state:
            raise DataError(
                "dual variable: expected a checkpoint with the 'num_updates' that "
                f"objective.constraint.warmup_steps counts, got {state}"
            )
        if self.calibration is not None:
            self.calibration.load_state_dict(state.get("tolerance"))
            if self.calibration.value is not None:
                self._adopt(self.calibration, self.calibration.value)
        if self.fresh_gap is not None:
            self.fresh_gap.load_state_dict(state.get("fresh_gap"))
        if self.watch is not None:
            self.watch.load_state_dict(state.get("watch"))
        self.num_updates = int(state.get("num_updates", 0))
        self.value = self._project(value)

    def _adopt(self, calibration: CalibratedTolerance, tolerance: float) -> float:
        """Take over a calibrated tolerance; return the factor of lambda."""
        self.margin = tolerance
        if self.reference_tolerance is None:
            return 1.0
        if calibration.measured == 0:
            raise DivergenceError(
                "dual variable: expected a measured gap above 0 to convert lambda to, got 0; set "
                "objective.constraint.reference_tolerance to null"
            )
        factor = self.reference_tolerance / calibration.measured
        rate, minimum, maximum = self._given
        self.learning_rate, self.minimum, self.maximum = (
            rate * factor**2,
            minimum * factor,
            maximum * factor,
        )
        return factor

    def _project(self, value: float, ceiling: float = math.inf) -> float:
        return max(min(value, self.maximum, ceiling), self.minimum)

    def __repr__(self) -> str:
        return (
            f"DualVariable(value={self.value}, learning_rate={self.learning_rate}, "
            f"tolerance={self.margin}, minimum={self.minimum}, maximum={self.maximum})"
        )


def penalty_ceiling(max_share: float | None, unit_share: float | None) -> float:
    """The lambda with which the penalty of a step would have been a share of the mean |A|.

    Args:
        max_share: the share; None: there is no bound.
        unit_share: the step's penalty for a lambda of 1 as a share of its mean |A|; None or NaN:
            every advantage is 0, or no token was kept.

    Returns:
        Infinite without a bound or a penalty; 0 if there is no |A| to be a share of.
    """
    if max_share is None or unit_share == 0:
        return math.inf
    is_unknown = unit_share is None or math.isnan(unit_share)
    return 0.0 if is_unknown else max_share / unit_share


def shape_advantages(
    advantages: torch.Tensor, discrepancy: torch.Tensor, dual_value: float
) -> torch.Tensor:
    """`A' = A - lambda * delta`, token by token; no gradient flows through delta.

    Args:
        advantages: [T] float32.
        discrepancy: [T] float32, `|p_train - p_inf|` or another constrained signal.
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


def gated_discrepancy(
    discrepancy: torch.Tensor,
    *,
    gate: str = "batch",
    tolerance: float = 0.0,
    maximum: float | None = None,
) -> torch.Tensor:
    """The part of a token's gap that is penalised; under gradient if delta is.

    Args:
        discrepancy: [T] float, at least 0.
        gate: "batch" and "mean" penalise the whole gap; with "mean" the caller also sets lambda to
            0 in a step whose mean gap is within the tolerance. "token" penalises the part of the
            gap above the tolerance.
        tolerance: c, for "token".
        maximum: larger gaps are clipped to this value; None: no limit.

    Returns:
        [T], discrepancy's dtype.
    """
    if gate not in GATES:
        raise ConfigError(
            f"objective.constraint.gate: expected one of {', '.join(GATES)}, got {gate!r}"
        )
    clamped = discrepancy if maximum is None else discrepancy.clamp(max=maximum)
    return (clamped - tolerance).clamp(min=0.0) if gate == "token" else clamped
