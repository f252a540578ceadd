"""`python -m megatron_rl.train CONFIG [key=value ...]` under torchrun: the journey of a prompt.

    prompt -> rollout -> reward -> advantage -> pack -> recomputed logprobs -> discrepancy -> loss
           -> optimizer step -> weight sync (-> acceptance)

Every rank runs this loop. The head of each replica (the first of its TP x PP ranks) requests
samples from the engines and scores them; global rank 0 publishes the weights and writes the
metrics.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.learner.batch.deal import deal_batch
from megatron_rl.learner.update.step import train_step
from megatron_rl.loop.acceptance import Acceptance
from megatron_rl.loop.collect import collect_step
from megatron_rl.loop.evaluate import evaluate_sets
from megatron_rl.loop.fixed_gap import measure_fixed_gap
from megatron_rl.loop.parity import ParityProbe
from megatron_rl.loop.publish import publication
from megatron_rl.loop.record import end_step, record_rollouts, save_hf_checkpoint
from megatron_rl.loop.report import write_metrics
from megatron_rl.loop.rest import engines_asleep, make_room
from megatron_rl.loop.run import start_run
from megatron_rl.loop.schedule import should_evaluate, should_publish
from megatron_rl.process.command import Progress, run_command


def train(config: Config, progress: Progress) -> None:
    """Run all remaining steps; see the docstring of this module."""
    with start_run(config, progress) as run:
        learner, parallel = run.learner, run.learner.parallel
        state, phase = run.state, run.stopwatch.time
        probe = ParityProbe(learner, run.link, config).check
        publish, restore = publication(learner, run.sender, probe, run.crew, state, config, phase)
        asleep = partial(engines_asleep, run.crew, run.link, learner, config, phase)
        taking_back = {"asleep": asleep, "restore": restore}
        acceptance = Acceptance(learner, run.link, publish, config, phase, **taking_back)
        evaluate = partial(evaluate_sets, run.evaluator, state, config, phase, restore=restore)
        fixed_gap = partial(measure_fixed_gap, learner, run.link, config, phase, restore)
        told = (run.recorder, run.stopwatch, parallel, run.verifiers, run.meter.measure)
        report = partial(write_metrics, *told)
        make_room(learner, config)
        end = partial(end_step, learner, state, config, run.inputs, run.source, run.writer)
        end = partial(end, run.checkpoints, run.recorder.say, phase, asleep)
        parity = publish()
        if run.was_resumed:
            run.stopwatch.take()  # discard the seconds of the start; they belong to no step
        elif config.eval.at_start:
            report(0, parity, evaluate(with_constant_answer=True), fixed_gap())
        else:
            report(0, parity)
        for step in state.steps(config.loop.num_steps):
            sampled = collect_step(run.source, parallel, state, config, phase, restore, run.failure)
            with asleep():
                acceptance.copy_state()
                with phase("learner"):
                    batch = deal_batch(
                        sampled.samples(),
                        parallel,
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
            parity = publish() if should_publish(config, step) else {}
            parity |= acceptance.decide(sampled)
            record_rollouts(run.writer, sampled, rows, parallel, step, config, phase)
            figures = evaluate() | fixed_gap() if should_evaluate(config, step) else {}
            # Before the checkpoint: a resumed run removes the lines of the steps that it repeats.
            warning = state.dual.warning()
            report(step, update.metrics, parity, figures, sampled=sampled, warning=warning)
            if end(update):
                return
        saved = None
        if config.checkpoint.save_hf:
            with phase("save"):
                saved = save_hf_checkpoint(learner, config)
        run.recorder.summarize(saved)


if __name__ == "__main__":
    what = "Train by RL with a discrepancy constraint."
    sys.exit(run_command(what, train, folder_of=lambda config: Path(config.run_dir)))
