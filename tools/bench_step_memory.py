"""Measures the peak memory of a learner's step whose logits are large.

    python tools/bench_step_memory.py [--vocab 151936] [--positions 2048] [--kept 256] [--hidden 64]

A Qwen3 of two layers with random weights trains on one row of so many positions, of which the last
`kept` are a response. Prints a JSON line: the peak of the process's resident memory during the
step, beyond what it was before (after a first step on a row without logits to speak of), in GiB;
the size of the logits of all positions and of the kept ones; and the seconds of the step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

MULTIPLE = 64
POLL_SECONDS = 0.002


def write_model(folder: Path, vocab_size: int, hidden_size: int) -> None:
    """Write the checkpoint; in its own function, so that the model's memory is free again."""
    config = Qwen3Config(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=vocab_size,
        max_position_embeddings=1 << 16,
        tie_word_embeddings=False,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


class PeakMemory:
    """The largest resident memory of this process while the context is open, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._has_ended.wait(POLL_SECONDS):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __enter__(self) -> PeakMemory:
        self.before = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._thread.join()


def measure(vocab_size: int, num_positions: int, num_kept: int, hidden_size: int) -> dict:
    """The figures of the printed line."""
    from megatron_rl.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
    from megatron_rl.learner.batch.packing import pack
    from megatron_rl.learner.layout.parallel import initialize_parallel
    from megatron_rl.learner.learner import Learner
    from megatron_rl.learner.update.step import train_step
    from megatron_rl.objective.constraint import DualVariable
    from megatron_rl.records import Rollout, Sample, TrainBatch
    from megatron_rl.weights.geometry import read_geometry

    def batch_of(length: int, kept: int) -> TrainBatch:
        prompt = length - kept
        rollout = Rollout(
            token_ids=torch.randint(0, vocab_size, (length,)).numpy(),
            loss_mask=[False] * prompt + [True] * kept,
            rollout_logprobs=[0.0] * prompt + [-12.0] * kept,
            weight_versions=[-1] * prompt + [0] * kept,
            finish_reason="stop",
            text="",
        )
        sample = Sample(prompt_index=0, sample_index=0, rollout=rollout, reward=1.0, advantage=1.0)
        rows = pack([sample], tokens_per_row=-(-length // MULTIPLE) * MULTIPLE)
        return TrainBatch(mini_batches=(tuple(rows),), num_left_out=(0,), dropped=())

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), vocab_size, hidden_size)
        parallel = initialize_parallel(ParallelConfig(), seed=0)
        learner = Learner(
            ModelConfig(path=folder),
            OptimizerConfig(),
            read_geometry(folder),
            parallel,
            num_updates=2,
        )

    def step(batch: TrainBatch) -> None:
        train_step(
            learner,
            batch,
            DualVariable(0.1),
            ObjectiveConfig(),
            step=1,
            weight_version=0,
            should_recompute=False,
        )

    step(batch_of(MULTIPLE, 1))
    batch = batch_of(num_positions, num_kept)
    start = time.perf_counter()
    with PeakMemory() as memory:
        step(batch)
    gib = 2**30
    return {
        "peak_gib": round((memory.peak - memory.before) / gib, 3),
        "logits_of_all_gib": round(4 * vocab_size * num_positions / gib, 3),
        "logits_of_kept_gib": round(4 * vocab_size * num_kept / gib, 3),
        "seconds": round(time.perf_counter() - start, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("vocab", 151936), ("positions", 2048), ("kept", 256), ("hidden", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    print(json.dumps(measure(given.vocab, given.positions, given.kept, given.hidden)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
