"""`python -m megatron_rl.train CONFIG [key=value ...]` under torchrun: the journey of a prompt.

    prompt -> rollout -> reward -> advantage -> pack -> recomputed logprobs -> discrepancy -> loss
           -> optimizer step -> weight sync

Every rank runs this loop. The heads of the replicas (first rank of TP x PP) ask the engines and
score; global rank 0 publishes weights and writes the records.
"""

from __future__ import annotations

import sys

from megatron_rl.config import Config
from megatron_rl.learner.batch.deal import deal_batch
from megatron_rl.learner.update.step import train_step
from megatron_rl.loop.collect import sample_step
from megatron_rl.loop.fixed_gap import fixed_gap
from megatron_rl.loop.publish import publish_weights
from megatron_rl.loop.report import write_metrics
from megatron_rl.loop.run import Run
from megatron_rl.loop.stations import (
    evaluate_held_out,
    make_samples,
    record_rollouts,
    save_hf_checkpoint,
)
from megatron_rl.process.command import Progress, run_command


def train(config: Config, progress: Progress) -> None:
    """Run all steps that are still to do; see the head of this file."""
    with Run(config, progress) as run:
        parity = publish_weights(run)
        if run.was_resumed:
            run.stations.take()  # the start belongs to no step
        else:
            is_wanted = config.eval.at_start
            before = evaluate_held_out(run, with_constant_answer=True) if is_wanted else {}
            write_metrics(run, parity, before, fixed_gap(run) if is_wanted else {})
        for step in run.steps():
            sampled = sample_step(run)
            with run.stations.time("learner"):
                dealt = deal_batch(
                    make_samples(
                        sampled.groups, sampled.scores, sampled.advantages, sampled.is_kept
                    ),
                    run.parallel,
                    samples_per_prompt=config.loop.samples_per_prompt,
                    num_mini_batches=config.learner.mini_batches_per_step,
                    tokens_per_row=config.learner.tokens_per_micro_batch,
                )
                report, recomputed = train_step(
                    run.learner,
                    dealt.batch,
                    run.dual,
                    config.objective,
                    step=step,
                    weight_version=step - 1,
                    should_recompute=config.learner.recompute == "always",
                )
            run.next_prompt += sampled.num_prompts
            parity = publish_weights(run) if should_publish(config, step) else {}
            record_rollouts(run, sampled, dealt, recomputed)
            evaluation = {}
            if should_evaluate(config, step):
                evaluation = evaluate_held_out(run) | fixed_gap(run)
            # Before the checkpoint: a step that is resumed after has its line, and loses it if it
            # is done again.
            write_metrics(run, report.metrics, parity, evaluation, sampled=sampled)
            if should_save(config, step):
                with run.stations.time("checkpoint"):
                    run.save()
        save_hf_checkpoint(run)
        run.recorder.summarize()


def should_publish(config: Config, step: int) -> bool:
    """Every `sync.every` steps; the last step is one of them (config/rules.py)."""
    return step % config.sync.every == 0


def should_evaluate(config: Config, step: int) -> bool:
    """Every `eval.every` steps, and after the last one where `eval.at_end` says so."""
    is_due = config.eval.every > 0 and step % config.eval.every == 0
    return is_due or (config.eval.at_end and step == config.loop.num_steps)


def should_save(config: Config, step: int) -> bool:
    """Every `checkpoint.every` steps, and always after the last one."""
    is_due = config.checkpoint.every > 0 and step % config.checkpoint.every == 0
    return is_due or step == config.loop.num_steps


if __name__ == "__main__":
    sys.exit(run_command("Train by RL with a discrepancy constraint.", train))
