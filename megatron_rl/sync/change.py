"""Whether an update reached an engine, from the changes of log-probs that it made.

The engine and the learner score the same given tokens before and after the update. Let x be the
learner's change of a token's log-prob and y the engine's. If the engine serves the new weights, y
is x and an independent error of rounding, so y^2 is at least x^2 on average, however coarse the
engine's weights are. If it serves the old ones, y is what a repeated request changes: nothing on a
CPU, little elsewhere. Hence

    R = sum y^2 / sum x^2

is 1 or more, or about 0, also where the gap between the two sides is the same before and after the
update. The engine is stale if R + Z se < 1/4 (`sync/ratios.py`), that is, if its log-probs changed
by less than half of the learner's. R says nothing, and no engine is called stale, if

- the bytes that were sent are those of the update before,
- the learner's log-probs changed by less than MIN_CHANGE, the rounding of float32, or
- the learner computes in lower precision, and its change is not above its own rounding, for which
  twice the gap between the two sides is the bound; except if the engine's log-probs are the same
  bits.

`docs/parity-probe.md` has the measured rates of both errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rl.sync.ratios import STANDARD_ERRORS, ratio

STALE_RATIO = 0.25
MIN_CHANGE = 1e-4
ROUNDING_FACTOR = 2.0  # by which a change must exceed the rounding of a learner below float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One sequence's log-probs of given tokens on both sides at the same weights.

    Example: `Scores(learner=tensor([-0.41, -1.30]), engine=tensor([-0.40, -1.32]))`.
    """

    learner: torch.Tensor  # [L] float64
    engine: torch.Tensor  # [L] float64


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeReport:
    """How far an engine's log-probs changed with the learner's.

    Example: `ChangeReport(num_sequences=8, num_tokens=96, learner_change=0.051,
    engine_change=0.058, ratio=1.31, standard_error=0.12, is_telling=True)`.
    """

    num_sequences: int
    num_tokens: int
    learner_change: float  # root of the mean square of x
    engine_change: float  # and of y
    ratio: float  # R
    standard_error: float
    is_telling: bool  # whether a stale engine would differ from one that serves the new weights

    @property
    def is_stale(self) -> bool:
        """Whether the engine certainly does not serve the new weights."""
        bound = self.ratio + STANDARD_ERRORS * self.standard_error
        return self.is_telling and bound < STALE_RATIO

    def complaint(self) -> str:
        """What is wrong with an engine that `is_stale`."""
        return (
            "parity probe: expected the log-probs of given tokens to change with the learner's, by "
            f"{self.learner_change:.2g} (root of the mean square over {self.num_tokens} tokens of "
            f"{self.num_sequences} sequences), got {self.engine_change:.2g}; the ratio of the "
            f"squares is {self.ratio:.2g} +- {self.standard_error:.2g}, certainly below "
            f"{STALE_RATIO}: the engine serves the weights of an earlier update, or its precision "
            "(rollout.dtype, rollout.quantization) is too coarse to follow the learner"
        )


def compare_changes(
    before: Sequence[Scores],
    after: Sequence[Scores],
    *,
    has_new_bytes: bool,
    is_exact_learner: bool,
) -> ChangeReport:
    """Compare the changes of an engine's and the learner's log-probs of the same sequences.

    Args:
        before, after: [G] the scores at the weights of the update before, and of this one.
        has_new_bytes: whether other bytes were sent than in the update before.
        is_exact_learner: whether the learner computes in float32.
    """
    x = [late.learner - early.learner for early, late in zip(before, after, strict=True)]
    y = [late.engine - early.engine for early, late in zip(before, after, strict=True)]
    num_tokens = sum(each.numel() for each in x)
    learner, engine = (_sums([each.square() for each in changes]) for changes in (x, y))
    gap = _sums([(early.learner - early.engine).square() for early in before])
    value, standard_error = ratio(engine, learner)
    learner_change, engine_change, rounding = (
        math.sqrt(float(sums.sum()) / max(num_tokens, 1)) for sums in (learner, engine, gap)
    )
    is_clear = is_exact_learner or learner_change > ROUNDING_FACTOR * rounding
    is_visible = learner_change > MIN_CHANGE and (is_clear or engine_change == 0.0)
    return ChangeReport(
        num_sequences=len(x),
        num_tokens=num_tokens,
        learner_change=learner_change,
        engine_change=engine_change,
        ratio=value,
        standard_error=standard_error,
        is_telling=has_new_bytes and is_visible,
    )


def _sums(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """[G] float64"""
    return torch.tensor([float(each.sum()) for each in values], dtype=torch.float64)
