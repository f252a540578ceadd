"""Settings of the corrections of the gap between learner and engine: importance weights, rejection,
and score centering.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.choices import ImportanceLevel, ImportanceMode, KLEstimator, RejectionLevel
from megatron_rl.config.rules import above_zero, at_least, at_most, literal_choices, require


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """Importance weights rho = p_train / p_inf on the surrogate (objective/importance.py)."""

    # sequence_sum: the product of the sequence's rho; sequence_mean: their geometric mean
    level: Literal["none", ImportanceLevel] = "none"
    # truncate: clip to the bounds; mask: 0 outside them; cis: truncate at 1 + cis_slope *
    # max(1 - p_train, cis_floor), a bound that is tighter for likelier tokens
    mode: ImportanceMode = "truncate"
    lower: float = 0.0
    upper: float = 2.0
    cis_slope: float = 2.3
    cis_floor: float = 5e-3
    # divide the weights by their mean over the global batch (one more forward pass)
    batch_normalize: bool = False

    def __post_init__(self) -> None:
        literal_choices(self)
        check_ratio_bounds(self.lower, self.upper)
        at_least(0, cis_slope=self.cis_slope, cis_floor=self.cis_floor)
        at_most(1, cis_floor=self.cis_floor)
        if self.mode == "cis":
            self._check_cis()
        require(
            not self.batch_normalize or self.level != "none",
            "batch_normalize: expected a level other than none, whose weights it normalises, got "
            "level=none",
        )

    def _check_cis(self) -> None:
        require(
            self.level == "token",
            f"level: expected token with mode=cis, whose bound is a token's, got {self.level}",
        )
        for key, default in (("lower", type(self).lower), ("upper", type(self).upper)):
            given = getattr(self, key)
            require(
                given == default,
                f"{key}: expected its default of {default:g} with mode=cis, whose bound follows "
                f"from cis_slope and cis_floor, got {given:g}",
            )


@dataclass(frozen=True, kw_only=True)
class RejectionConfig:
    """Which tokens and sequences are left out of the loss (objective/rejection.py)."""

    # k1 = -log rho, k2 = (log rho)^2 / 2, k3 = rho - 1 - log rho, with rho = p_train / p_inf
    divergence: Literal["none", KLEstimator] = "none"
    level: RejectionLevel = "token"
    lower: float = 0.0  # k1 only, where both bounds are ratios: lower <= exp(-k1) <= upper
    upper: float = 2.0  # for k2 and k3 in nats
    veto_ratio: float = 0.0  # a sequence with a token whose rho is below this is rejected; 0: off
    veto_probability: float = 0.0  # the same for a token whose p_train is below this; 0: off
    # OPSM: a sequence with a negative advantage gets weight 0 if its
    # mean(log p_inf - log p_theta) exceeds this; null: off
    opsm_threshold: float | None = None

    def __post_init__(self) -> None:
        literal_choices(self)
        if self.divergence in ("none", "k1"):
            check_ratio_bounds(self.lower, self.upper)
        else:
            above_zero(upper=self.upper)
            require(
                self.lower == 0,
                f"lower: expected 0 with divergence={self.divergence}, which has an upper bound "
                f"only, got {self.lower:g}",
            )
        at_least(0, veto_ratio=self.veto_ratio, veto_probability=self.veto_probability)
        require(self.veto_ratio < 1, f"veto_ratio: expected in [0, 1), got {self.veto_ratio:g}")
        require(
            self.veto_probability < 1,
            f"veto_probability: expected in [0, 1), got {self.veto_probability:g}",
        )
        if self.opsm_threshold is not None:
            at_least(0, opsm_threshold=self.opsm_threshold)


@dataclass(frozen=True, kw_only=True)
class ScoreCenteringConfig:
    """Subtracts from a token's score its mean under the engine (objective/score_centering.py;
    arXiv 2609.20807).
    """

    enabled: bool = False
    # K: log-probs that the engine sends with each token, those of the likeliest tokens
    num_logprobs: int = 32

    def __post_init__(self) -> None:
        at_least(1, num_logprobs=self.num_logprobs)

    @property
    def num_requested(self) -> int:
        """K if rollouts need heads, and 0 if they do not."""
        return self.num_logprobs if self.enabled else 0


def check_ratio_bounds(lower: float, upper: float) -> None:
    """Raises ConfigError unless the bounds of a ratio contain 1, so that equal policies are never
    corrected.
    """
    require(0 <= lower <= 1, f"lower: expected a ratio in [0, 1], got {lower:g}")
    require(upper >= 1, f"upper: expected a ratio of at least 1, got {upper:g}")
