"""What the constraint and the metrics of the gap cost a step.

    NPROC=2 launch/torchrun.sh tools.bench_constraint configs/quickstart.yaml \\
        run_dir=runs/bench_constraint loop.num_steps=200

A real run whose odd steps are those of the config and whose even steps are plain GRPO: no
constraint and no metric of the discrepancy. They differ in the learner's station alone, so the cost
is the difference of its medians, over the median of a whole plain step. The first steps are left
out.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import megatron_rl.train
from megatron_rl.config import Config, ObjectiveConfig
from megatron_rl.entry import Progress, run_command
from megatron_rl.errors import ConfigError
from megatron_rl.learner import row_loss
from megatron_rl.learner.step import train_step
from megatron_rl.observe.run_log import read_metrics
from megatron_rl.step_metrics import STEP_STATIONS

NUM_WARM_UP = 10
MIN_STEPS = NUM_WARM_UP + 20


def is_plain(step: int) -> bool:
    return step % 2 == 0


def alternating_step(
    learner: object, batch: object, dual: object, config: ObjectiveConfig, *, step: int, **rest: Any
) -> Any:
    """`train_step`, in even steps as plain GRPO."""
    with ExitStack() as stack:
        if is_plain(step):
            config = replace(config, constraint=replace(config.constraint, enabled=False))
            stack.enter_context(mock.patch.object(row_loss, "discrepancy_metrics", return_value={}))
        return train_step(learner, batch, dual, config, step=step, **rest)


def bench(config: Config, progress: Progress) -> None:
    """The run, and one line about it from rank 0."""
    if config.loop.num_steps < MIN_STEPS or not config.objective.constraint.enabled:
        raise ConfigError(
            f"bench_constraint: expected loop.num_steps of at least {MIN_STEPS} and the constraint "
            f"enabled, got {config.loop.num_steps} and "
            f"objective.constraint.enabled={config.objective.constraint.enabled}"
        )
    with mock.patch.object(megatron_rl.train, "train_step", alternating_step):
        megatron_rl.train.train(config, progress)
    if os.environ.get("RANK", "0") == "0":
        print(cost_of(read_metrics(Path(config.run_dir) / "metrics.jsonl")))


def cost_of(records: Sequence[dict[str, Any]]) -> str:
    """The medians of both kinds of steps in words."""
    steps = [each for each in records if each["step"] > NUM_WARM_UP]
    learner: dict[bool, float] = {}
    for kind in (True, False):
        own = [each for each in steps if is_plain(each["step"]) is kind]
        learner[kind] = statistics.median(each["speed/seconds/learner"] for each in own)
    whole = statistics.median(
        sum(each.get(f"speed/seconds/{station}", 0.0) for station in STEP_STATIONS)
        for each in steps
        if is_plain(each["step"])
    )
    cost = learner[False] - learner[True]
    return (
        f"learner, median of {len(steps)} steps in turn: {learner[False]:.4f} s with the "
        f"constraint and its metrics, {learner[True]:.4f} s without; {cost / whole:+.2%} of a "
        f"step of {whole:.3f} s"
    )


if __name__ == "__main__":
    sys.exit(run_command("The cost of the constraint.", bench))
