"""Numbers that are not finite. Steps in which an update was left out because of one are told and
counted, and end the run when there are too many in a row. Weights that are not finite end it at
once, since every later update would be broken: they are neither published nor saved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.errors import DivergenceError
from megatron_rl.learner.model.checkpoint_files import FOLDER, checkpoint_name, checkpoints_by_age
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


def check_weights(problem: str, state: LoopState, config: Config) -> None:
    """Check the weights after `state.step`, before they are published or saved.

    Args:
        problem: `Learner.weights_problem()`, the same on every rank.
    Raises:
        DivergenceError: one of them is not finite.
    """
    if not problem:
        return
    if state.step == 0:
        raise DivergenceError(f"{problem}, before the first step; look at {config.model.path}")
    folder = Path(config.run_dir) / FOLDER
    sound = [each for each in checkpoints_by_age(folder) if each.name < checkpoint_name(state.step)]
    way_on = f"resume={sound[0]}" if sound else "resume=never, since there is no earlier checkpoint"
    raise DivergenceError(
        f"{problem}, after step {state.step}; they are neither published nor saved, and the "
        f"engines keep those of version {state.published_version}; lower "
        f"learner.optimizer.learning_rate, and go on with {way_on}"
    )
