"""The state of the loop that changes from step to step: one small record, the same on every rank,
saved with every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.config import ConstraintConfig
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.objective.dual_watch import DualWatch
from megatron_rl.objective.fresh_gap import FreshGap
from megatron_rl.objective.tolerance import CalibratedTolerance
from megatron_rl.rollout.ledger import Ledger


@dataclass(slots=True, kw_only=True)
class LoopState:
    """The progress of a run.

    Example: in its twelfth step, with weights published after the eleventh: `LoopState(
    dual=DualVariable(0.104), step=12, next_prompt=704, published_version=11)`.
    """

    dual: DualVariable
    step: int = 0  # the running step, or the last one that ended
    next_prompt: int = 0  # index of the first prompt that no step has used yet
    # the step after which the engines' current weights were published; not saved, because a resumed
    # run publishes its weights before it samples
    published_version: int = 0
    num_broken: int = 0  # steps in a row until now without an update (loop/broken.py)
    # of a run that samples ahead, when its last checkpoint was written; otherwise every prompt
    # before `next_prompt` is used and no other
    ledger: Ledger = field(default_factory=Ledger)

    def steps(self, num_steps: int) -> Iterator[int]:
        """Increment `step` up to `num_steps` and yield each remaining step."""
        while self.step < num_steps:
            self.step += 1
            yield self.step

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return {
            "step": self.step,
            "next_prompt": self.next_prompt,
            "used_ahead": list(self.ledger.ahead),
            "num_broken": self.num_broken,
            "dual": self.dual.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that was saved with a checkpoint.

        Raises:
            DataError: the state of lambda is incomplete.
        """
        self.step = state["step"]
        self.next_prompt = state["next_prompt"]
        # absent from older checkpoints
        self.num_broken = state.get("num_broken", 0)
        self.ledger = Ledger(first=self.next_prompt, ahead=tuple(state.get("used_ahead", ())))
        self.dual.load_state_dict(state["dual"])


def initial_state(config: ConstraintConfig) -> LoopState:
    """The state before the first step, with lambda at its initial value."""
    calibration = None
    tolerance = config.tolerance
    if isinstance(tolerance, str):  # "auto"
        calibration = CalibratedTolerance(
            config.tolerance_steps, config.tolerance_slack, config.tolerance_factor
        )
        tolerance = 0.0  # a placeholder until it is calibrated
    is_above_fresh = config.enabled and config.tolerance_above == "fresh_gap"
    fresh_gap = FreshGap() if is_above_fresh else None
    if config.fixed_lambda is not None:
        value, measured = config.fixed_lambda, {"calibration": calibration, "fresh_gap": fresh_gap}
        return LoopState(dual=DualVariable(value, 0.0, tolerance, value, value, **measured))
    is_constant = config.learning_rate == 0 or config.minimum == config.maximum
    should_watch = config.warn_after_steps > 0 and not is_constant
    return LoopState(
        dual=DualVariable(
            config.initial,
            config.learning_rate,
            tolerance,
            config.minimum,
            config.maximum,
            warmup_steps=config.warmup_steps,
            calibration=calibration,
            reference_tolerance=config.reference_tolerance,
            fresh_gap=fresh_gap,
            watch=DualWatch(config.warn_after_steps) if should_watch else None,
        )
    )
