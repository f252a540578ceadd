"""Advantages, the constraint and the loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.config.rules import above_zero, at_least, one_of, require


@dataclass(frozen=True, kw_only=True)
class ConstraintConfig:
    """DCMDP (arXiv 2606.08779): E[|p_train - p_inf|] <= tolerance, through a dual variable."""

    enabled: bool = True  # false: plain GRPO, the discrepancy is only measured
    initial: float = 0.1  # lambda before the first step
    # eta of lambda <- clip(lambda + eta * (mean discrepancy - tolerance), minimum, maximum)
    learning_rate: float = 1.0
    tolerance: float = 0.0037
    minimum: float = 0.0
    maximum: float = 10.0

    def __post_init__(self) -> None:
        at_least(0, learning_rate=self.learning_rate, minimum=self.minimum)
        require(
            0 <= self.tolerance <= 1,
            f"tolerance: expected a difference of probabilities in [0, 1], got {self.tolerance:g}",
        )
        require(
            self.minimum <= self.initial <= self.maximum,
            f"initial: expected from minimum={self.minimum:g} to maximum={self.maximum:g}, "
            f"got {self.initial:g}",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    clip_low: float = 0.2
    clip_high: float = 0.24
    # token_mean: over the global batch's kept tokens; sequence_mean: mean of sequences' means
    normalize: str = "token_mean"
    advantage_epsilon: float = 1e-6
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, ("token_mean", "sequence_mean"))
        require(0 <= self.clip_low < 1, f"clip_low: expected in [0, 1), got {self.clip_low:g}")
        at_least(0, clip_high=self.clip_high)
        above_zero(advantage_epsilon=self.advantage_epsilon)
