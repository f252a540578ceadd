"""Measures how much the arithmetic of a log-prob alone changes it, from the same logits.

    python tools/arithmetic_gap.py configs/quickstart.yaml run_dir=runs/arithmetic \\
        replay=runs/quickstart/rollouts

Computes the learner's logits for the recorded tokens of step 1, in one process whatever layout the
config has, and compares the aligned log-prob with torch's log_softmax in float32 and in BF16.
Prints one JSON line for each of the two, with the mean and the largest |p - p_aligned|:
`{"way": "log_softmax in float32", "mean": 2e-8, "largest": 1e-7, "num_tokens": 3072}`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_rl.config import Config, ParallelConfig
from megatron_rl.errors import ConfigError
from megatron_rl.learner.batch.deal import pack_rows, unscored_samples
from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.passes.forward import run_schedule
from megatron_rl.loop.preflight import prepare_data
from megatron_rl.ops.logprobs import token_logprobs
from megatron_rl.process.command import Progress, run_command
from megatron_rl.rollout.recording import read_step

DTYPES = {"log_softmax in float32": torch.float32, "log_softmax in bfloat16": torch.bfloat16}


def compare(config: Config, progress: Progress) -> None:
    """Run one forward pass over the recorded step and print the gaps.

    Raises:
        ConfigError: there are no recorded rollouts.
    """
    if not config.replay:
        raise ConfigError("arithmetic_gap: expected replay=<a run's rollouts/>, got none")
    config = replace(config, parallel=ParallelConfig())  # one rank
    geometry, _, _ = prepare_data(config)
    parallel = initialize_parallel(config.parallel, seed=config.loop.seed)
    learner = Learner(config.model, config.learner.optimizer, geometry, parallel, num_updates=1)
    samples = unscored_samples([each.group for each in read_step(Path(config.replay), 1)])
    rows = pack_rows(samples, parallel, config.learner.tokens_per_micro_batch, min_rows=1)
    gaps: dict[str, list[torch.Tensor]] = {way: [] for way in DTYPES}

    def on_output(index: int, logits: torch.Tensor) -> None:
        row = rows[index]
        kept = logits[0, :, : geometry.vocab_size].contiguous()
        labels, temperature = row.labels[row.loss_mask], config.rollout.sampling.temperature
        aligned = token_logprobs(kept, labels, temperature=temperature).double().exp()
        for way, dtype in DTYPES.items():
            log_softmax = (kept.to(dtype) / temperature).log_softmax(1)
            found = log_softmax.gather(1, labels[:, None])[:, 0].double().exp()
            gaps[way].append((found - aligned).abs())

    with torch.no_grad():
        run_schedule(learner.trained.parts, rows, on_output, parallel=parallel, forward_only=True)
    for way, parts in gaps.items():
        of_tokens = torch.cat(parts)
        figures = {"mean": float(of_tokens.mean()), "largest": float(of_tokens.max())}
        print(json.dumps({"way": way, **figures, "num_tokens": of_tokens.numel()}), flush=True)
    shut_down_parallel()


if __name__ == "__main__":
    sys.exit(run_command("Measures what the arithmetic of log-probs alone changes.", compare))
