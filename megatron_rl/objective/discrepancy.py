"""The gap between learner and engine on every sampled token, the other signals that the constraint
can be about, and the sum that drives the dual step.

    delta[t] = |exp(recomputed_logprobs[t]) - exp(rollout_logprobs[t])|     (arXiv 2606.08779)

It is an absolute difference of probabilities: it lies between 0 and 1, and does not explode like a
ratio where both probabilities are small. Its mean is over all sampled response tokens, before any
rejection or masking, because masking the tokens with a large gap must not make the gap look small.
The other metrics of the gap are in gap_metrics.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch

from megatron_rl.config.choices import Measure
from megatron_rl.errors import ConfigError, DivergenceError
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO
from megatron_rl.records import MAX_LOGPROB_ROUNDING, MISSING_LOGPROB

MEASURES = get_args(Measure)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscrepancySum:
    """Sum and count whose quotient is the mean discrepancy, or the mean of another constrained
    signal: the control signal of lambda. The sums of rows and then of ranks are added; only the
    mean over the global batch is meaningful.

    Example of two tokens with gaps of 0.01 and 0.03: `DiscrepancySum(total=0.04, num_tokens=2.0)`.
    """

    total: torch.Tensor  # [] float64, sum of delta over the sampled tokens
    num_tokens: torch.Tensor  # [] float64

    def __add__(self, other: DiscrepancySum) -> DiscrepancySum:
        return DiscrepancySum(
            total=self.total + other.total, num_tokens=self.num_tokens + other.num_tokens
        )

    @property
    def mean(self) -> float:
        """The mean of delta; NaN if there is no token."""
        num_tokens = float(self.num_tokens)
        return float(self.total) / num_tokens if num_tokens else math.nan


def discrepancy(recomputed_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> torch.Tensor:
    """`|p_train - p_inf|` per token.

    Args:
        recomputed_logprobs: any shape, float; the learner's, at the weights before the update.
        rollout_logprobs: same shape, float; the engine's, when it sampled.

    Returns:
        Same shape, float32, exactly 0 where both are equal. It is computed in float64: if two
        probabilities near 1 differ in the seventh digit, their difference in float32 would have
        only one correct digit.
    """
    _check_shapes(recomputed_logprobs, rollout_logprobs)
    return (recomputed_logprobs.double().exp() - rollout_logprobs.double().exp()).abs().float()


def constrained_signal(
    recomputed_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, *, measure: str
) -> torch.Tensor:
    """The signal of every token that the constraint is about. The paper compares three of them (its
    Fig. 2), with `rho = p_train / p_inf`:

        probability: |p_train - p_inf|,   ratio: |rho - 1|,   log_ratio: |log rho|

    Args:
        recomputed_logprobs, rollout_logprobs: one shape, float.
        measure: one of the three.

    Returns:
        Same shape, float32, at least 0, exactly 0 where both are equal. The log-ratio in |rho - 1|
        is clamped to +-20.

    Raises:
        ConfigError: `measure` is unknown.
    """
    _check_shapes(recomputed_logprobs, rollout_logprobs)
    if measure == "probability":
        return discrepancy(recomputed_logprobs, rollout_logprobs)
    log_ratio = recomputed_logprobs.double() - rollout_logprobs.double()
    if measure == "ratio":
        return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expm1().abs().float()
    if measure == "log_ratio":
        return log_ratio.abs().float()
    raise ConfigError(
        f"objective.constraint.measure: expected one of {', '.join(MEASURES)}, got {measure!r}"
    )


def _check_shapes(recomputed_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> None:
    if recomputed_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(
            f"discrepancy: expected log-probs of one shape, got recomputed "
            f"{tuple(recomputed_logprobs.shape)} and rollout {tuple(rollout_logprobs.shape)}"
        )


def check_logprobs(logprobs: torch.Tensor, mask: torch.Tensor, *, name: str = "log-prob") -> None:
    """Raise an error if an invalid log-prob would enter the loss. The caller adds step and rank to
    the message.

    Args:
        logprobs: [T] float. mask: [T] bool; positions where it is False are not checked.
        name: which policy's log-probs they are, for the message.

    Raises:
        DivergenceError: a kept log-prob is NaN, -9999 or below, or above 0; the message names the
            worst position.
    """
    if logprobs.shape != mask.shape:
        raise ValueError(
            f"check_logprobs: expected logprobs of the mask's shape {tuple(mask.shape)}, "
            f"got {tuple(logprobs.shape)}"
        )
    logprobs = logprobs.detach().float()
    # Written so that NaN, for which every comparison is false, counts as broken.
    is_broken = mask & ~((logprobs > MISSING_LOGPROB) & (logprobs <= MAX_LOGPROB_ROUNDING))
    if not bool(is_broken.any()):
        return
    # NaN counts as the worst, followed by the value farthest from 0; -1 excludes valid positions.
    badness = torch.where(is_broken, logprobs.abs().nan_to_num(nan=torch.inf, posinf=3e38), -1.0)
    position = int(badness.argmax())
    raise DivergenceError(
        f"{name} at position {position}: expected a number in ({MISSING_LOGPROB:g}, 0], got "
        f"{logprobs[position].item()} ({int(is_broken.sum())} of {int(mask.sum())} kept tokens are "
        f"broken); look for NaN in the weights or logits of the engine that computed it"
    )
