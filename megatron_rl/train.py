"""`python -m megatron_rl.train CONFIG [key=value ...]` under torchrun: the journey of a prompt.

    prompt -> rollout -> reward -> advantage -> pack -> recomputed logprobs -> discrepancy -> loss
           -> optimizer step -> weight sync (-> acceptance)

Every rank runs this loop. The head of each replica (the first of its TP x PP ranks) requests
samples from the engines and scores them; global rank 0 publishes the weights and writes the
metrics.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.learner.batch.deal import deal_batch
from megatron_rl.learner.update.step import train_step
from megatron_rl.loop.phases import phases_of
from megatron_rl.loop.record import save_hf_checkpoint
from megatron_rl.loop.rest import make_room
from megatron_rl.loop.run import start_run
from megatron_rl.loop.schedule import should_evaluate, should_publish
from megatron_rl.process.command import Progress, run_command


def train(config: Config, progress: Progress) -> None:
    """Run all remaining steps; see the docstring of this module."""
    with start_run(config, progress) as run:
        learner, state, phase = run.learner, run.state, run.stopwatch.time
        phases = phases_of(run)
        make_room(learner, config)
        parity = phases.publish()
        if run.was_resumed:
            run.stopwatch.take()  # discard the seconds of the start; they belong to no step
        elif config.eval.at_start:
            evaluated = phases.evaluate(with_constant_answer=True)
            phases.report(0, parity, evaluated, phases.fixed_gap())
        else:
            phases.report(0, parity)
        for step in state.steps(config.loop.num_steps):
            sampled = phases.collect()
            with phases.asleep():
                phases.acceptance.copy_state()
                with phase("learner"):
                    batch = deal_batch(
                        sampled.samples(),
                        learner.parallel,
                        samples_per_prompt=config.loop.samples_per_prompt,
                        num_mini_batches=config.learner.mini_batches_per_step,
                        tokens_per_row=config.learner.tokens_per_micro_batch,
                        attention_length=learner.geometry.attention_length,
                    )
                    update, rows = train_step(
                        learner,
                        batch,
                        state.dual,
                        config.objective,
                        step=step,
                        weight_version=step - 1,
                        should_recompute=config.learner.recompute == "always",
                    )
            state.next_prompt += sampled.num_prompts
            warning = state.dual.warning()  # of this step's tolerance: a publication may change it
            parity = phases.publish() if should_publish(config, step) else {}
            parity |= phases.acceptance.decide(sampled)
            phases.record(step, sampled, rows)
            evaluated = {}
            if should_evaluate(config, step):
                evaluated = phases.evaluate() | phases.fixed_gap()
            # Before the checkpoint: a resumed run removes the lines of the steps that it repeats.
            told = (update.metrics, parity, evaluated)
            phases.report(step, *told, sampled=sampled, warning=warning)
            if phases.end(update):
                return
        saved = None
        if config.checkpoint.save_hf:
            with phase("save"):
                saved = save_hf_checkpoint(learner, config)
        run.recorder.summarize(saved)


if __name__ == "__main__":
    what = "Train by RL with a discrepancy constraint."
    sys.exit(run_command(what, train, folder_of=lambda config: Path(config.run_dir)))
