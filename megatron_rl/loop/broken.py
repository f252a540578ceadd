"""Steps in which an update was left out, because a number in it was not finite: they are told and
counted, and end the run when there are too many in a row.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_rl.config import Config
from megatron_rl.errors import DivergenceError
from megatron_rl.loop.state import LoopState
from megatron_rl.records import StepReport


def count_broken(
    state: LoopState, report: StepReport, config: Config, say: Callable[[str], None]
) -> None:
    """Count a step that has ended, the same on every rank.

    Args:
        say: prints a line.
    Raises:
        DivergenceError: more than `learner.max_broken_steps` in a row were broken.
    """
    if not report.problem:
        state.num_broken = 0
        return
    state.num_broken += 1
    limit = config.learner.max_broken_steps
    if state.num_broken > limit:
        raise DivergenceError(
            f"{report.problem}; step {report.step} is the {state.num_broken}. in a row without an "
            f"update, learner.max_broken_steps={limit} are allowed; the weights are those of step "
            f"{report.step - state.num_broken}"
        )
    say(
        f"step {report.step}: no update ({state.num_broken} in a row, "
        f"learner.max_broken_steps={limit}), weights and optimizer are as before: {report.problem}"
    )
