"""Measures the cost per step of the constraint and of the metrics of the discrepancy.

    NPROC=2 launch/torchrun.sh tools.bench_constraint configs/quickstart.yaml \\
        run_dir=runs/bench_constraint loop.num_steps=200

This is a real run. Its odd steps are those of the config; its even steps ("plain") are GRPO without
the constraint and without the metrics of the discrepancy. The two kinds differ in the training step
and in the line of metrics that is written after it. The cost is the difference between the medians
of these two together, relative to the median duration of a whole plain step. The first steps are
left out. Plain steps still compute the discrepancy of every token, and the share of tokens outside
the sampler's support.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import megatron_rl.train
from megatron_rl.config import Config, ObjectiveConfig
from megatron_rl.errors import ConfigError
from megatron_rl.learner.update import row_loss
from megatron_rl.learner.update.step import train_step
from megatron_rl.loop.report import STEP_PHASES, write_metrics
from megatron_rl.objective.discrepancy import DiscrepancySum
from megatron_rl.observe.run_log import read_metrics
from megatron_rl.process.command import Progress, run_command

NUM_WARM_UP = 10
MIN_STEPS = NUM_WARM_UP + 20


def is_plain(step: int) -> bool:
    """Whether a step runs without the constraint and its metrics."""
    return step % 2 == 0


class AlternatingSteps:
    """Replaces two functions that train.py calls: makes even steps plain, and times every step."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}  # step -> seconds of training and writing metrics

    def train(
        self, learner: object, batch: object, dual: object, config: ObjectiveConfig, **rest: Any
    ) -> Any:
        """`learner.update.step.train_step`."""
        start, step = time.perf_counter(), rest["step"]
        with ExitStack() as stack:
            if is_plain(step):
                config = replace(config, constraint=replace(config.constraint, enabled=False))
                zero = torch.zeros((), dtype=torch.float64)
                no_metrics = (DiscrepancySum(total=zero, num_tokens=zero), {})
                nothing = mock.patch.object(
                    row_loss, "discrepancy_metrics", return_value=no_metrics
                )
                stack.enter_context(nothing)
            result = train_step(learner, batch, dual, config, **rest)
        self.seconds[step] = time.perf_counter() - start
        return result

    def write(self, *parts: Any, **sampled: Any) -> None:
        """`loop.report.write_metrics`, whose fifth argument is the step."""
        start, step = time.perf_counter(), parts[4]
        write_metrics(*parts, **sampled)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


def bench(config: Config, progress: Progress) -> None:
    """Run the training, and print the cost on rank 0.

    Raises:
        ConfigError: there are too few steps, or the constraint is disabled.
    """
    if config.loop.num_steps < MIN_STEPS or not config.objective.constraint.enabled:
        raise ConfigError(
            f"bench_constraint: expected loop.num_steps of at least {MIN_STEPS} and the constraint "
            f"enabled, got {config.loop.num_steps} and "
            f"objective.constraint.enabled={config.objective.constraint.enabled}"
        )
    steps = AlternatingSteps()
    with (
        mock.patch.object(megatron_rl.train, "train_step", steps.train),
        mock.patch.object(megatron_rl.train, "write_metrics", steps.write),
    ):
        megatron_rl.train.train(config, progress)
    if os.environ.get("RANK", "0") == "0":
        print(cost_of(read_metrics(Path(config.run_dir) / "metrics.jsonl"), steps.seconds))


def cost_of(records: Sequence[Mapping[str, Any]], seconds: Mapping[int, float]) -> str:
    """The medians of both kinds of steps, and the cost, in words.

    Args:
        records: the lines of metrics of the run, which have the seconds of every phase.
        seconds: step -> seconds of training and writing metrics.
    """
    known = {each["step"]: each for each in records if each["step"] > NUM_WARM_UP}
    plain = [step for step in known if is_plain(step)]
    with_all = [step for step in known if not is_plain(step)]
    without, with_constraint = (
        statistics.median(seconds[step] for step in kind) for kind in (plain, with_all)
    )
    whole = statistics.median(
        sum(known[step].get(f"speed/seconds/{phase}", 0.0) for phase in STEP_PHASES)
        for step in plain
    )
    return (
        f"training and metrics, medians of {len(known)} steps in turn: {with_constraint:.4f} s "
        f"with the constraint, {without:.4f} s without; {(with_constraint - without) / whole:+.2%} "
        f"of a step of {whole:.3f} s"
    )


if __name__ == "__main__":
    sys.exit(run_command("Measures the cost of the constraint.", bench))
