"""TRL's side of `bench_step.py`: MODEL NUM_TOKENS NUM_STEPS. Prints the seconds of each step as a
list in JSON. It runs in an environment that has TRL and not this package.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

NUM_PROMPTS, NUM_SAMPLES = 32, 8


class Clock(TrainerCallback):
    """Takes the time of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_, **__) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def share_of_digits(completions: list[str], **_) -> list[float]:
    """A reward that costs nothing."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def main(model: str, num_tokens: int, num_steps: int) -> None:
    """Train, and print the seconds."""
    torch.set_num_threads(os.cpu_count() or 1)
    random.seed(0)
    prompts = [
        {"prompt": f"{random.randint(10, 99)}+{random.randint(10, 99)}="}
        for _ in range(NUM_PROMPTS * (num_steps + 1))
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=NUM_PROMPTS * NUM_SAMPLES,
            num_generations=NUM_SAMPLES,
            max_completion_length=num_tokens,
            max_steps=num_steps,
            use_cpu=True,
            bf16=False,
            learning_rate=1e-6,
            beta=0.0,
            temperature=1.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        GRPOTrainer(
            model=model,
            reward_funcs=share_of_digits,
            args=config,
            train_dataset=Dataset.from_list(prompts),
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            callbacks=[clock],
        ).train()
    print(json.dumps(clock.seconds))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
