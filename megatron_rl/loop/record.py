"""Writes the files of a step: its rollouts, the learner's log-probs of them, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from megatron_rl.config import Config
from megatron_rl.data.tokenizer import read_template
from megatron_rl.errors import DataError
from megatron_rl.learner.batch.deal import by_sample
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.checkpoint_files import FOLDER, latest_checkpoint
from megatron_rl.learner.model.checkpoint_writer import CheckpointWriter, Written
from megatron_rl.loop.ahead import is_ahead, save_ahead
from megatron_rl.loop.broken import check_weights, count_broken
from megatron_rl.loop.hf_checkpoints import hf_folder, mark_written
from megatron_rl.loop.inputs import Inputs
from megatron_rl.loop.schedule import should_save, should_save_hf
from megatron_rl.loop.state import LoopState
from megatron_rl.loop.stop import forget_request, is_asked_to_stop
from megatron_rl.observe.stopwatch import Phase
from megatron_rl.records import RecomputedRow, SampledStep, StepReport
from megatron_rl.rollout.recording import write_recomputed, write_step
from megatron_rl.rollout.source import RolloutSource
from megatron_rl.rollout.writer import RolloutWriter
from megatron_rl.weights.huggingface import write_checkpoint


def record_rollouts(
    writer: RolloutWriter,
    parallel: Parallel,
    config: Config,
    phase: Phase,
    step: int,
    sampled: SampledStep,
    rows: Iterable[RecomputedRow],
) -> None:
    """Have every rollout of the step written, with the learner's log-probs if they were computed,
    while the loop goes on. A replay writes nothing.

    Args:
        rows: of the training step; empty except on the last pipeline stage.
    """
    if config.replay:
        return
    with phase("record"):
        holds_logprobs = parallel.is_row_writer
        found = by_sample(rows) if holds_logprobs else []  # copies them from the device

        def write(folder: Path) -> None:
            if parallel.is_replica_head:
                num_ranks = parallel.dp_size
                write_step(folder, step, parallel.dp_rank, sampled.groups, num_ranks=num_ranks)
            if holds_logprobs:
                write_recomputed(
                    folder,
                    step,
                    parallel.dp_rank,
                    prompt_index=[sample.prompt_index for sample, _ in found],
                    sample_index=[sample.sample_index for sample, _ in found],
                    lengths=[len(logprobs) for _, logprobs in found],
                    recomputed_logprobs=torch.cat([torch.zeros(0), *(each for _, each in found)]),
                )

        if parallel.is_replica_head or holds_logprobs:
            writer.submit(step, write)


@dataclass(frozen=True, slots=True)
class StepEnd:
    """How a step ends on this rank: with the checkpoints that are due, and perhaps with the run."""

    learner: Learner
    state: LoopState
    config: Config
    inputs: Inputs  # of `loop/inputs.py`, with which a resumed run compares its own
    source: RolloutSource | None  # on the heads of the replicas
    writer: RolloutWriter  # of the rollouts, which must be on disk before a checkpoint
    checkpoints: CheckpointWriter
    say: Callable[[str], None]  # prints a line
    phase: Phase
    # the context in which the optimizer's state is on the device (rest.py); a collective
    asleep: Callable[[], AbstractContextManager[None]]

    def finish(self, update: StepReport) -> bool:
        """Count the step if its update was left out, and write the checkpoints that are due: the
        one to resume from, which may be completed in the next step, and the Hugging Face
        checkpoint. Returns whether the run was asked to stop here, before its last step
        (`loop/stop.py`); then the first of them is due. A collective over all ranks.

        Raises:
            DivergenceError: there are too many steps in a row without an update, or a weight is
                not finite.
            DataError: a checkpoint could not be written, of this or of an earlier step.
        """
        state, config = self.state, self.config
        count_broken(state, update, config, self.say)
        run_dir, is_last = Path(config.run_dir), state.step == config.loop.num_steps
        is_stopping = not is_last and is_asked_to_stop(run_dir, self.learner.parallel)
        self._tell(self.checkpoints.advance())
        is_due, is_hf_due = should_save(config, state.step), should_save_hf(config, state.step)
        is_due = is_due or is_stopping
        if is_due or is_hf_due:
            check_weights(self.learner.weights_problem(), state, config)
        if is_due:
            self._save()
        if is_hf_due:
            with self.phase("save"):
                save_hf_checkpoint(self.learner, config, step=state.step)
        if is_stopping or is_last:
            with self.phase("checkpoint"):
                self._tell(self.checkpoints.finish())
        if is_stopping:
            forget_request(run_dir, is_first=self.learner.parallel.rank == 0)
            self.say(f"stopped after step {state.step}, as it was asked to")
        return is_stopping

    def _save(self) -> None:
        """Begin the checkpoint to resume from."""
        with self.phase("checkpoint"), self.asleep():
            self.writer.wait()  # a run that resumes here finds the rollouts of every step
            self._tell(self.checkpoints.finish())
            if is_ahead(self.config):
                save_ahead(self.source, self.state, self.config, self.learner.parallel)
            run_state = {**self.state.state_dict(), "inputs": self.inputs}
            self._tell(self.checkpoints.save(run_state, step=self.state.step))

    def _tell(self, written: Written | None) -> None:
        if written is not None and written.number == 1:  # of this process
            self.say(str(written))


def save_hf_checkpoint(learner: Learner, config: Config, *, step: int | None = None) -> Path:
    """Write the weights as a Hugging Face checkpoint (`hf_folder`); its folder. A collective over
    all ranks.

    Args:
        step: None: the final weights.

    Raises:
        DataError: the disk is full or not writable. An earlier checkpoint of the same name is
            unchanged, and so are those to resume from.
    """
    run_dir = Path(config.run_dir)
    folder = hf_folder(run_dir, step)
    if learner.parallel.rank == 0:
        try:
            write_checkpoint(
                folder,
                learner.full_tensors(),
                like=config.model.path,
                chat_template=read_template(config.data.chat_template_file),
            )
            if step is None:
                mark_written(run_dir, latest_checkpoint(run_dir / FOLDER))
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{folder}: expected to write the weights, got {type(error).__name__}: {error}; "
                "free some disk space or change run_dir; the run's checkpoints are untouched, and "
                "tools/convert_checkpoint.py writes the weights of one of them"
            ) from error
    else:
        learner.give_tensors()
    learner.parallel.barrier()
    return folder
