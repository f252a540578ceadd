"""Settings of the objective: advantages, the constraint, and the loss. Those of the corrections of
the gap are in config/correction.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_rl.config.choices import (
    ABSOLUTE_BOUND_LOSSES,
    POLICY_LOSSES,
    SEQUENCE_LOSSES,
    SQUARED_PENALTIES,
    AdvantageStd,
    Baseline,
    Gate,
    KLEstimator,
    Measure,
    Normalize,
    OldPolicy,
    Penalty,
    ToleranceAbove,
)
from megatron_rl.config.correction import (
    ImportanceConfig,
    RejectionConfig,
    ScoreCenteringConfig,
)
from megatron_rl.config.presets import PRESETS
from megatron_rl.config.rules import (
    above_zero,
    at_least,
    at_most,
    literal_choices,
    one_of,
    require,
)


@dataclass(frozen=True, kw_only=True)
class ConstraintConfig:
    """The constraint E[delta] <= tolerance on a token's signal delta, by default |p_train - p_inf|,
    enforced by a dual variable lambda (DCMDP, arXiv 2606.08779).
    """

    enabled: bool = True  # false: plain GRPO; the discrepancy is measured, not constrained
    # the signal delta, with rho = p_train / p_inf: probability: |p_train - p_inf|; ratio:
    # |rho - 1|; log_ratio: |log rho|. Shaping, dual step and tolerance are all in its unit
    measure: Measure = "probability"
    # shaping: A - lambda * delta. The others are terms lambda * x of the loss, under gradient:
    # differentiable: x = |p_theta - p_inf|; squared_difference: (p_theta - p_inf)^2;
    # squared_ratio: (p_theta / p_inf - 1)^2; squared_log_ratio: (log p_theta / p_inf)^2
    penalty: Penalty = "shaping"
    # batch: the penalty applies in every step; mean: only in steps whose mean gap exceeds the
    # tolerance (one more forward pass); token: only to the part of a token's gap that exceeds it,
    # max(delta - tolerance, 0); not for the squared penalties
    gate: Gate = "batch"
    # subtracted from a token's gap before it is penalised. none: 0, as published; batch: the mean
    # gap of the kept tokens of the global batch (one more forward pass)
    baseline: Baseline = "none"
    fixed_lambda: float | None = None  # lambda stays at this value; null: the dual step moves it
    initial: float = 0.1  # lambda before the first step
    # eta of lambda <- clip(lambda + eta * (mean discrepancy - tolerance), minimum, maximum)
    learning_rate: float = 1.0
    warmup_steps: int = 0  # dual steps over which eta rises to learning_rate
    # a number; or auto: measured over the first tolerance_steps steps, in which nothing is
    # penalised
    tolerance: float | str = 0.0037
    # fresh_gap: the tolerance counts from the gap of rollouts of weights that were just published.
    # The parity probe measures it (the mean of the last 10 publications), so that lambda follows
    # the gap of age alone (objective/fresh_gap.py)
    tolerance_above: ToleranceAbove = "zero"
    tolerance_steps: int = 10
    tolerance_slack: float = 2.0  # standard errors above the measured mean
    tolerance_factor: float = 1.0  # of the measured tolerance; below 1 the gap is to shrink
    # for tolerance=auto: the gap that initial, learning_rate, minimum and maximum are given for,
    # e.g. the paper's 0.0037. They are converted to the measured gap, lambda by reference / gap and
    # eta by its square, so that lambda * gap is the same share of an advantage; null: they are not
    reference_tolerance: float | None = None
    minimum: float = 0.0
    maximum: float = 10.0
    # after a step lambda is at most that with which the step's penalty would have been this share
    # of the mean |A|, as far as minimum allows; in and after a step of which no advantage differs
    # from 0 it is minimum; null: no such bound
    max_penalty_share: float | None = None
    # a line in the console if lambda has been at its maximum for so many steps, or has grown for so
    # many while the gap did not fall (objective/dual_watch.py); 0: never
    warn_after_steps: int = 20
    # a token's gap is clipped to this when penalised by shaping or differentiable; null: it is not
    max_discrepancy: float | None = None

    def __post_init__(self) -> None:
        literal_choices(self)
        require(
            self.baseline == "none" or self.penalty == "shaping",
            f"baseline: expected none with penalty={self.penalty}, whose gradient a constant does "
            f"not change, got {self.baseline}",
        )
        at_least(0, learning_rate=self.learning_rate, minimum=self.minimum)
        if self.fixed_lambda is not None:
            at_least(0, fixed_lambda=self.fixed_lambda)
        at_least(0, warmup_steps=self.warmup_steps, tolerance_slack=self.tolerance_slack)
        at_least(2, tolerance_steps=self.tolerance_steps)
        above_zero(tolerance_factor=self.tolerance_factor)
        require(
            self.warn_after_steps == 0 or self.warn_after_steps >= 4,
            f"warn_after_steps: expected 0 (never) or at least 4, got {self.warn_after_steps}",
        )
        self._check_units()
        if isinstance(self.tolerance, str):
            require(
                self.tolerance == "auto",
                f"tolerance: expected a number or auto, got {self.tolerance!r}",
            )
            require(
                self.tolerance_above == "zero",
                "tolerance: expected a number with tolerance_above=fresh_gap, got auto, which "
                "measures the whole gap of the first steps",
            )
        else:
            self._check_tolerance(self.tolerance)
        if self.max_penalty_share is not None:
            above_zero(max_penalty_share=self.max_penalty_share)
        if self.reference_tolerance is not None:
            above_zero(reference_tolerance=self.reference_tolerance)
        require(
            self.minimum <= self.initial <= self.maximum,
            f"initial: expected from minimum={self.minimum:g} to maximum={self.maximum:g}, "
            f"got {self.initial:g}",
        )

    def _check_tolerance(self, tolerance: float) -> None:
        if self.measure == "probability":
            require(
                0 <= tolerance <= 1,
                f"tolerance: expected a difference of probabilities in [0, 1], got {tolerance:g}",
            )
        require(
            0 <= tolerance < math.inf,
            f"tolerance: expected a finite number of at least 0, in the unit of "
            f"measure={self.measure}, got {tolerance:g}",
        )
        for key, default in (("tolerance_factor", 1.0), ("reference_tolerance", None)):
            value = getattr(self, key)
            require(
                value == default,
                f"{key}: expected it with tolerance=auto only, got {value} with "
                f"tolerance={tolerance:g}",
            )

    def _check_units(self) -> None:
        """gate=token and max_discrepancy act on a single token's penalty, so they need its unit."""
        is_squared = self.penalty in SQUARED_PENALTIES
        require(
            not is_squared or self.gate != "token",
            f"gate: expected batch or mean with penalty={self.penalty}, which estimates a "
            "divergence only as a whole, got token",
        )
        require(
            not is_squared or self.max_discrepancy is None,
            f"max_discrepancy: expected null with penalty={self.penalty}, which estimates a "
            f"divergence only as a whole, got {self.max_discrepancy}",
        )
        is_other = self.penalty == "differentiable" and self.measure != "probability"
        require(
            not is_other or self.gate != "token",
            "gate: expected batch or mean with penalty=differentiable, a difference of "
            f"probabilities, and a tolerance in the unit of measure={self.measure}, got token",
        )
        if self.max_discrepancy is not None:
            above_zero(max_discrepancy=self.max_discrepancy)
            if is_other or self.measure == "probability":
                at_most(1, max_discrepancy=self.max_discrepancy)


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The KL to a frozen reference policy (objective/regularizers.py)."""

    coefficient: float = 0.0  # 0: the KL is measured if there is a reference, and not penalised
    # k2, k3: a term of the loss; k1: a term of the advantages (its gradient in the loss has mean 0)
    estimator: KLEstimator = "k3"
    reference: str = ""  # Hugging Face checkpoint folder of the reference; "": none

    def __post_init__(self) -> None:
        literal_choices(self)
        at_least(0, coefficient=self.coefficient)
        require(
            self.coefficient == 0 or bool(self.reference),
            f"reference: expected a checkpoint folder with coefficient={self.coefficient:g}, "
            "got an empty text",
        )


@dataclass(frozen=True, kw_only=True)
class AcceptanceConfig:
    """An update that makes the engine's policy worse than the learner's is taken back (MIPU, arXiv
    2606.29526; objective/acceptance.py).
    """

    enabled: bool = False
    # the update stays if J of the learner exceeds J of the engine, both at the new weights, by at
    # most this; in units of the advantage
    max_loss: float = 1e-4
    cap: float = 2.0  # upper bound of the weight p_new / p_inf of a token in the estimate of J
    num_samples: int = 64  # kept responses of the step that both score, at most

    def __post_init__(self) -> None:
        at_least(1, cap=self.cap, num_samples=self.num_samples)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective that an update maximises.

    Without a preset, the defaults are DC-GRPO as published (arXiv 2606.08779, Alg. 1): the same as
    `preset=dc_grpo`, with the paper's lambda and tolerance for Qwen3-8B. What the paper leaves open
    (clip_low, the bounds of lambda) is listed in docs/paper.md.
    """

    # a published method (config/presets.py): a named set of the settings below and of others.
    # Settings in the file or on the command line take precedence over it, and the run names them
    # when it starts; "": none
    preset: str = ""
    policy_loss: str = "ppo_clip"  # a module of objective/policy/
    # the policy in the denominator of the ratio. recomputed: the learner before the update;
    # rollout: the engine (bypass), which needs no forward pass before the update
    old_policy: OldPolicy = "recomputed"
    clip_low: float = 0.2  # for dppo_tv both are differences of probabilities
    clip_high: float = 0.24
    # a ratio above the cap counts as the cap, and its token keeps a gradient of that weight.
    # 0: off; auto: 20 with policy_loss=dppo_tv or old_policy=rollout, unless cispo's clip or the
    # dual clip bounds the ratio already
    ratio_cap: float | str = "auto"
    # PPO's dual clip: for a negative advantage A the surrogate is at least dual_clip * A; 0: off
    dual_clip: float = 0.0
    # sequence_mean: mean of the sequences' means; token_mean: mean over the global batch's kept
    # tokens; sequence_sum: mean of the sequences' sums; constant: sum / (sequences x
    # normalize_length)
    normalize: Normalize = "sequence_mean"
    normalize_length: int = 0  # for normalize=constant, e.g. ${rollout.sampling.max_tokens}
    advantage_epsilon: float = 1e-6
    # the standard deviation by which a group's advantages are divided: population (1 / G),
    # unbiased (1 / (G - 1), as torch.std in verl and TRL), or none
    advantage_std: AdvantageStd = "population"
    entropy_coefficient: float = 0.0  # of the entropy bonus
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    score_centering: ScoreCenteringConfig = field(default_factory=ScoreCenteringConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    acceptance: AcceptanceConfig = field(default_factory=AcceptanceConfig)

    def __post_init__(self) -> None:
        if self.preset:
            one_of("preset", self.preset, tuple(PRESETS))
        literal_choices(self)
        one_of("policy_loss", self.policy_loss, POLICY_LOSSES)
        require(
            (self.normalize_length > 0) == (self.normalize == "constant"),
            "normalize_length: expected at least 1 with normalize=constant and 0 otherwise, got "
            f"{self.normalize_length} with normalize={self.normalize}",
        )
        largest = "1]" if self.policy_loss in ABSOLUTE_BOUND_LOSSES else "1)"
        require(
            0 <= self.clip_low < 1 or (largest == "1]" and self.clip_low == 1),
            f"clip_low: expected in [0, {largest}, got {self.clip_low:g}",
        )
        at_least(0, clip_high=self.clip_high, entropy_coefficient=self.entropy_coefficient)
        above_zero(advantage_epsilon=self.advantage_epsilon)
        self._check_ratio_bounds()
        self._check_combinations()
        if self.score_centering.enabled:
            self._check_score_centering()

    def _check_score_centering(self) -> None:
        """Score centering needs a weight of every token that the engine could have sampled."""
        reason = "with score_centering.enabled, which needs the weight of tokens not sampled"
        require(
            self.policy_loss not in SEQUENCE_LOSSES,
            f"policy_loss: expected the loss of a token {reason}, got {self.policy_loss}",
        )
        require(
            self.importance.level in ("none", "token"),
            f"importance.level: expected none or token {reason}, got {self.importance.level}",
        )
        require(
            self.rejection.divergence == "none" or self.rejection.level != "token",
            f"rejection.level: expected one of a sequence {reason} (importance.mode=mask gives "
            "tokens outside the bounds a weight of 0), got token",
        )
        require(
            self.old_policy == "recomputed",
            "old_policy: expected recomputed with score_centering.enabled, because the score has "
            f"mean 0 already if the ratio is p_theta / p_inf, got {self.old_policy}",
        )

    @property
    def ratio_bound(self) -> float:
        """The cap on the ratio p_theta / p_old that `ratio_cap` means; 0: none.

        auto is 20, as in verl, for dppo_tv, whose trust region does not bound the ratio, and under
        bypass, where the ratio contains the gap between learner and engine. It is off if the ratio
        is bounded by cispo's clip or by the dual clip.
        """
        if not isinstance(self.ratio_cap, str):
            return self.ratio_cap
        is_bounded = self.policy_loss == "cispo" or self.dual_clip > 0
        is_open = self.policy_loss == "dppo_tv" or self.old_policy == "rollout"
        return 20.0 if is_open and not is_bounded else 0.0

    def _check_ratio_bounds(self) -> None:
        cap, has_own_bounds = self.ratio_cap, self.policy_loss in ABSOLUTE_BOUND_LOSSES
        require(
            self.dual_clip == 0 or (self.dual_clip > 1 and not has_own_bounds),
            "dual_clip: expected 0, or above 1 with a policy_loss that takes PPO's minimum, got "
            f"{self.dual_clip:g} with policy_loss={self.policy_loss}",
        )
        if isinstance(cap, str):
            require(cap == "auto", f"ratio_cap: expected a number or auto, got {cap!r}")
            return
        smallest = 1.0 if has_own_bounds else 1.0 + self.clip_high
        require(
            cap == 0 or cap >= smallest,
            f"ratio_cap: expected auto, 0 or at least {smallest:g}, the largest ratio that the "
            f"clip leaves alone, got {cap:g}",
        )
        require(
            cap == 0 or (self.policy_loss != "cispo" and self.dual_clip == 0),
            "ratio_cap: expected auto or 0 with policy_loss=cispo or a dual_clip, which bound the "
            f"ratio already, got {cap:g}",
        )

    def _check_combinations(self) -> None:
        is_bypass = self.old_policy == "rollout"
        require(
            not is_bypass or self.importance.level == "none",
            "importance.level: expected none with old_policy=rollout, whose ratio p_theta / p_inf "
            f"is the importance weight already, got {self.importance.level}",
        )
        require(
            not (is_bypass and self.constraint.enabled and self.constraint.gate == "mean"),
            "constraint.gate: expected batch or token with old_policy=rollout, which saves the "
            "forward pass that the mean gap comes from, got mean",
        )
        require(
            not (is_bypass and self.constraint.enabled and self.constraint.baseline == "batch"),
            "constraint.baseline: expected none with old_policy=rollout, which saves the forward "
            "pass that the mean gap comes from, got batch",
        )
        require(
            self.policy_loss not in SEQUENCE_LOSSES or self.importance.level != "token",
            "importance.level: expected sequence_mean or sequence_sum with policy_loss=gspo, whose "
            "ratio is the sequence's, got token",
        )
        require(
            self.policy_loss not in SEQUENCE_LOSSES
            or self.rejection.divergence == "none"
            or self.rejection.level != "token",
            "rejection.level: expected one of a sequence with policy_loss=gspo, whose ratio is the "
            "sequence's, got token",
        )
