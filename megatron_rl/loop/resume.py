"""Which checkpoint a run goes on from: the newest one whose files are as they were written.

Every rank chooses by the small files before any process is started. Once the ranks are connected
they divide the files among themselves and compute their SHA-256. A checkpoint with a wrong file is
passed over, with a line that names the file, and the one before it is taken; but one that the
setting `resume` names is an error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError, DataError, NothingToDo
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.checkpoint_files import (
    FOLDER,
    LATEST,
    STATE,
    checkpoints_by_age,
    latest_checkpoint,
    named_by_latest,
    saved_run_state,
)
from megatron_rl.learner.model.checkpoint_sums import SUMS, read_sums, wrong_file
from megatron_rl.loop.hf_checkpoints import is_written
from megatron_rl.loop.inputs import Inputs, changed_settings, check_same_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """Where a run goes on. Example: `Resumption(checkpoint=Path("runs/a/checkpoints/step_000004"),
    older=(Path("runs/a/checkpoints/step_000002"),),
    changes=("objective.clip_high: 0.24 became 0.28",),
    lines=("checkpoint step_000006: __0_0.distcp is missing; going back to step_000004",))`.
    """

    checkpoint: Path | None = None  # None: the run starts anew
    older: tuple[Path, ...] = ()  # what is left to go back to, the newest first
    changes: tuple[str, ...] = ()  # a line for each setting that differs from the checkpoint's
    lines: tuple[str, ...] = ()  # on the checkpoints, for the user

    def told(self, step: int, next_prompt: int, tolerance: float | None = None) -> list[str]:
        """All lines for the user: on the checkpoints, where the run goes on, and what has changed.

        Args:
            step: the last one that is done. next_prompt: the first one that is not used.
            tolerance: of the constraint, if the first steps have measured it.
        """
        if self.checkpoint is None:
            return [*self.lines]
        place = f"resumed after step {step}, at prompt {next_prompt}, from {self.checkpoint}"
        lines = [*self.lines, place, *(f"changed since then: {line}" for line in self.changes)]
        if self.changes and tolerance is not None:
            lines.append(
                f"kept: the tolerance of {tolerance:.3g}, which was measured before these changes "
                "(objective.constraint.tolerance=auto; only a new run_dir measures it anew)"
            )
        return lines


def plan_resumption(config: Config, inputs: Inputs) -> Resumption:
    """The checkpoint that `resume` selects, after a look at its small files.

    Args:
        inputs: of this run.
    Raises:
        ConfigError: it is of another run than this one, or there may be none. DataError: there is
            none whose small files are as they were written.
    """
    folder = Path(config.run_dir) / FOLDER
    if config.resume == "never":
        if latest_checkpoint(folder):
            raise ConfigError(
                f"resume=never: expected a run_dir without checkpoints, got {config.run_dir}, "
                "which has some; choose another run_dir, or delete this one"
            )
        return Resumption()
    if config.resume != "auto":
        chosen = Path(config.resume)
        if not chosen.is_dir():
            raise DataError(f"resume: expected auto, never or a checkpoint folder, got {chosen}")
        return _take([chosen], inputs, ())
    candidates, name = checkpoints_by_age(folder), named_by_latest(folder)
    if not candidates:
        return Resumption()
    lines: tuple[str, ...] = ()
    if candidates[0].name != name:
        found = "no such file" if name is None else repr(name)
        lines = (
            f"{folder / LATEST}: expected the name of a checkpoint, got {found}; taking the newest "
            f"one, {candidates[0].name}",
        )
    return _take(candidates, inputs, lines)


def verify_resumption(resumption: Resumption, inputs: Inputs, parallel: Parallel) -> Resumption:
    """The resumption, or one from an older checkpoint, after a look at all files. A collective over
    all ranks.

    Raises:
        DataError: no checkpoint that can be taken has files as they were written.
    """
    while resumption.checkpoint is not None:
        started = time.monotonic()
        try:
            sums = read_sums(resumption.checkpoint)
        except DataError as error:  # every rank reads the same file
            resumption = _go_back(resumption, str(error), inputs)
            continue
        if sums is None:
            line = f"checkpoint {resumption.checkpoint.name}: not verified, as it has no {SUMS}"
            return replace(resumption, lines=(*resumption.lines, line))
        # Dealt by name: the files of tensors of all ranks have about the same size.
        own = sorted(sums)[parallel.rank :: parallel.world_size]
        problem = parallel.first_problem(wrong_file(resumption.checkpoint, sums, own) or "")
        if not problem:
            num_bytes = sum((resumption.checkpoint / name).stat().st_size for name in sums)
            line = (
                f"checkpoint {resumption.checkpoint.name}: {len(sums)} files, "
                f"{num_bytes / 1e6:.1f} MB, are as they were written (SHA-256, "
                f"{time.monotonic() - started:.1f} s)"
            )
            return replace(resumption, lines=(*resumption.lines, line))
        resumption = _go_back(resumption, problem, inputs)
    return resumption


def check_unfinished(config: Config, planned: Resumption) -> None:
    """Raise NothingToDo if the run has taken all of its steps and written its final weights. A run
    that is told which checkpoint to take, or of which one is damaged, goes on.

    Args:
        planned: where the run would go on.

    Raises:
        DataError: the checkpoint has no run state.
    """
    checkpoint = planned.checkpoint
    if config.resume != "auto" or planned.lines or checkpoint is None:
        return
    if saved_run_state(checkpoint)["step"] < config.loop.num_steps:
        return
    if config.checkpoint.save_hf and not is_written(Path(config.run_dir), checkpoint):
        return
    raise NothingToDo(f"all {config.loop.num_steps} steps are done; raise loop.num_steps to go on")


def _take(candidates: Sequence[Path], inputs: Inputs, lines: tuple[str, ...]) -> Resumption:
    """The first of the candidates whose small files are right."""
    checkpoint, older = candidates[0], tuple(candidates[1:])
    resumption = Resumption(checkpoint=checkpoint, older=older, lines=lines)
    try:
        sums = read_sums(checkpoint)
        if sums is not None:
            problem = wrong_file(checkpoint, sums, [STATE])
        else:
            problem = None if (checkpoint / STATE).is_file() else f"{STATE} is missing"
        saved = saved_run_state(checkpoint).get("inputs", {}) if problem is None else {}
    except DataError as error:
        return _go_back(resumption, str(error), inputs)
    if problem is not None:
        return _go_back(resumption, problem, inputs)
    check_same_inputs(saved, inputs, checkpoint)
    return replace(resumption, changes=tuple(changed_settings(saved, inputs)))


def _go_back(resumption: Resumption, problem: str, inputs: Inputs) -> Resumption:
    """The resumption from the checkpoint before one that has a problem."""
    assert resumption.checkpoint is not None
    told = f"checkpoint {resumption.checkpoint}: {problem}"
    if not resumption.older:
        before = "".join(f"{line}; " for line in resumption.lines)
        raise DataError(
            f"{before}{told}; expected a checkpoint whose files are as they were written; resume "
            "from another one (resume=FOLDER), or start anew (resume=never)"
        )
    line = f"{told}; going back to {resumption.older[0].name}"
    return _take(resumption.older, inputs, (*resumption.lines, line))
