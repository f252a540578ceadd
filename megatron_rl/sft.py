"""`python -m megatron_rl.sft CONFIG [key=value ...]` under torchrun: supervised warm start.

Reads pairs of prompt and response, trains on them with the same learner as RL, and writes a Hugging
Face checkpoint. The loss is the mean negative log-prob of the response tokens of the global batch.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_rl.config import Config, ObjectiveConfig
from megatron_rl.data.pairs import Pair, PairStream
from megatron_rl.data.tokenizer import load_tokenizer, read_template
from megatron_rl.errors import DivergenceError
from megatron_rl.learner.batch.deal import pack_rows
from megatron_rl.learner.layout.deterministic import use_deterministic_algorithms
from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.passes.forward import LossTerms, RowOutput
from megatron_rl.learner.update.row_balance import balance_scales
from megatron_rl.objective.normalize import normalized_sum
from megatron_rl.observe.loading import LoadingConsole
from megatron_rl.observe.metrics import Mean, merge, reduce
from megatron_rl.observe.recorder import Recorder
from megatron_rl.process.command import Progress, run_command
from megatron_rl.process.folder import check_new_folder
from megatron_rl.records import MicroBatch, Rollout, Sample
from megatron_rl.weights.agreement import check_checkpoint
from megatron_rl.weights.geometry import read_geometry
from megatron_rl.weights.huggingface import write_checkpoint

OBJECTIVE = ObjectiveConfig(normalize="token_mean")  # nothing else of it has an effect here
NUM_RECENT_LOSSES = 20  # their mean is compared with `warm_start.stop_loss`


def warm_start(config: Config, progress: Progress) -> None:
    """Train on the responses and save the checkpoint; see the docstring of this module."""
    settings = config.warm_start
    folder = warm_start_folder(config)
    output = Path(settings.output or folder / "checkpoint")
    check_new_folder(output, f"warm_start.output={output}")
    geometry = read_geometry(config.model.path)
    geometry.check_layout(config.parallel)
    check_checkpoint(config.model.path, geometry)
    is_first = int(os.environ.get("RANK", "0")) == 0
    with LoadingConsole(is_shown=is_first) as watch:
        tokenizer = load_tokenizer(config.model.path, geometry.vocab_size)
        stream = PairStream(config, tokenizer, watch)
    if config.model.kernels.deterministic:
        use_deterministic_algorithms()
    parallel = initialize_parallel(config.parallel, seed=config.loop.seed)
    progress.meet()
    learner = Learner(
        config.model,
        replace(
            config.learner.optimizer,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            decay=settings.decay,
        ),
        geometry,
        parallel,
        num_updates=settings.num_steps,
        # There are no other routes than the router's: no engine, and no separate pass.
        moe=replace(config.learner.moe, routing_replay="none"),
    )
    recorder = Recorder(
        folder, rank=parallel.rank, num_steps=settings.num_steps, last_step=-1, config=config
    )
    recent_losses: deque[float] = deque(maxlen=NUM_RECENT_LOSSES)
    with recorder:
        for step in range(1, settings.num_steps + 1):
            progress.describe = lambda step=step: f"in step {step} of the warm start"
            first = (step - 1) * settings.sequences_per_step
            start = settings.sequences_per_step * parallel.dp_rank // parallel.dp_size
            stop = settings.sequences_per_step * (parallel.dp_rank + 1) // parallel.dp_size
            samples = as_samples(stream.pairs(first + start, stop - start), first + start)
            rows = pack_rows(samples, parallel, config.learner.tokens_per_micro_batch, min_rows=1)
            metrics = learn(learner, rows)
            recent_losses.append(metrics["loss/mean"])
            # The same number on every rank, so that all of them stop at the same step.
            mean_loss = sum(recent_losses) / len(recent_losses)
            is_full = len(recent_losses) == NUM_RECENT_LOSSES
            is_last = step == settings.num_steps or (is_full and mean_loss <= settings.stop_loss)
            if step % settings.log_every == 0 or is_last:
                recorder.write(step, metrics)
            if is_last:
                break
    if parallel.rank == 0:
        write_checkpoint(
            output,
            learner.full_tensors(),
            like=config.model.path,
            chat_template=read_template(config.data.chat_template_file),
        )
        recorder.say(f"warm start saved in {output}")
    else:
        learner.give_tensors()
    shut_down_parallel()


def warm_start_folder(config: Config) -> Path:
    """The folder of a warm start, in that of the run."""
    return Path(config.run_dir) / "warm_start"


def as_samples(pairs: Sequence[Pair], first_index: int) -> list[Sample]:
    """Pairs as samples that can be packed; the mask keeps the response tokens."""
    samples = []
    for index, (prompt_ids, response_ids) in enumerate(pairs):
        length = len(prompt_ids) + len(response_ids)
        rollout = Rollout(
            token_ids=(*prompt_ids, *response_ids),
            loss_mask=(False,) * len(prompt_ids) + (True,) * len(response_ids),
            rollout_logprobs=(0.0,) * length,
            weight_versions=(-1,) * length,
            finish_reason="stop",
            text="",
        )
        samples.append(
            Sample(
                prompt_index=first_index + index,
                sample_index=0,
                rollout=rollout,
                reward=0.0,
                advantage=0.0,
            )
        )
    return samples


def learn(learner: Learner, rows: Sequence[MicroBatch]) -> dict[str, float]:
    """Take one optimizer step on the mean negative log-prob of the kept tokens, and on the losses
    that balance experts; return metrics. A collective over all ranks.
    """

    def row_loss(index: int, output: RowOutput) -> LossTerms:
        row = rows[index]
        total, count = normalized_sum(
            -output.logprobs, row.loss_mask, row.sequence_ids, normalize=OBJECTIVE.normalize
        )
        if not bool(torch.isfinite(total)):
            raise DivergenceError(
                f"warm start, rank {learner.parallel.rank}: expected a finite loss, got "
                f"{total.item()}; lower warm_start.learning_rate"
            )
        return LossTerms(
            total=total,
            count=count,
            num_kept=int(count),
            result={"loss/mean": Mean(sum=total.item(), count=int(count))},
        )

    parallel = learner.parallel
    known = [(row, None) for row in rows]
    balance = balance_scales(known, learner.moe, OBJECTIVE, parallel, num_left_out=0)
    results, grad_norm = learner.update(rows, row_loss, balance=balance)
    assert grad_norm is not None, "every response ends with a token, so there was a step"
    reduced = reduce(merge(results), parallel.batch_reducer()) if parallel.is_last_stage else {}
    metrics = parallel.from_last_stage(reduced)
    return (
        metrics
        | learner.take_router_metrics()
        | {
            "learner/grad_norm": grad_norm,
            "learner/learning_rate": learner.learning_rate,
        }
    )


if __name__ == "__main__":
    sys.exit(run_command("Supervised warm start.", warm_start, folder_of=warm_start_folder))
