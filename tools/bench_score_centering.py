"""Measures the cost per step of score centering beside truncated importance sampling alone.

    NPROC=2 launch/torchrun.sh tools.bench_score_centering configs/quickstart.yaml \\
        objective.preset=score_centering_tis run_dir=runs/bench_score_centering loop.num_steps=60

This is a real run. Its odd steps are those of the config; in its even steps ("plain") the engine
sends no heads and the loss is not centered. An odd step and the even one after it are a pair. For
sampling, for the training step and for the whole step, the median of the pairs' ratios is printed,
with the quarter of the pairs below and above. The first steps are left out.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import megatron_rl.train
from megatron_rl.config import Config, ObjectiveConfig
from megatron_rl.errors import ConfigError
from megatron_rl.learner.update.step import train_step
from megatron_rl.loop.report import STEP_PHASES
from megatron_rl.observe.run_log import read_metrics
from megatron_rl.process.command import Progress, run_command
from megatron_rl.rollout.live import LiveSource
from megatron_rl.rollout.source import RolloutRequest, TakenRollouts

NUM_WARM_UP = 4
MIN_STEPS = NUM_WARM_UP + 10


def is_plain(step: int) -> bool:
    """Whether a step runs without heads and without centering."""
    return step % 2 == 0


def train_in_turn(
    learner: object, batch: object, dual: object, config: ObjectiveConfig, **rest: Any
) -> Any:
    """`learner.update.step.train_step`, without centering in plain steps."""
    if is_plain(rest["step"]):
        config = replace(config, score_centering=replace(config.score_centering, enabled=False))
    return train_step(learner, batch, dual, config, **rest)


class TakeInTurn:
    """`LiveSource.take` that requests no heads in plain steps."""

    def __init__(self, num_logprobs: int) -> None:
        self._num_logprobs = num_logprobs
        self._take = LiveSource.take

    def __call__(self, source: LiveSource, request: RolloutRequest) -> TakenRollouts:
        """This replica's share of the rollouts of a step."""
        source._num_logprobs = 0 if is_plain(request.step) else self._num_logprobs
        return self._take(source, request)


def bench(config: Config, progress: Progress) -> None:
    """Run the training, and print the cost on rank 0.

    Raises:
        ConfigError: there are too few steps, the loss is not centered, or nothing is sampled.
    """
    centering = config.objective.score_centering
    if config.loop.num_steps < MIN_STEPS or not centering.enabled or config.replay:
        raise ConfigError(
            f"bench_score_centering: expected loop.num_steps of at least {MIN_STEPS}, score "
            f"centering and no replay, got {config.loop.num_steps}, "
            f"objective.score_centering.enabled={centering.enabled} and replay={config.replay!r}"
        )
    take = TakeInTurn(centering.num_logprobs)
    with (
        mock.patch.object(megatron_rl.train, "train_step", train_in_turn),
        mock.patch.object(LiveSource, "take", lambda source, request: take(source, request)),
    ):
        megatron_rl.train.train(config, progress)
    if os.environ.get("RANK", "0") == "0":
        for line in cost_of(read_metrics(Path(config.run_dir) / "metrics.jsonl")):
            print(line)


def cost_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ratios of both kinds of steps, in words.

    Args:
        records: the lines of metrics of the run, which have the seconds of every phase.
    """
    known = {each["step"]: each for each in records if each["step"] > NUM_WARM_UP}
    pairs = [(step, step + 1) for step in known if not is_plain(step) and step + 1 in known]
    lines = []
    for name, phases in (
        ("sampling", ("rollout",)),
        ("training step", ("learner",)),
        ("whole step", STEP_PHASES),
    ):

        def seconds(step: int, phases: Sequence[str] = phases) -> float:
            return sum(known[step].get(f"speed/seconds/{phase}", 0.0) for phase in phases)

        ratios = [seconds(centered) / seconds(plain) for centered, plain in pairs]
        low, median, high = statistics.quantiles(ratios, n=4)
        lines.append(
            f"{name}: {median:.3f} times plain ({low:.3f} to {high:.3f}), of "
            f"{statistics.median(seconds(plain) for _, plain in pairs):.3f} s, {len(pairs)} pairs"
        )
    return lines


if __name__ == "__main__":
    sys.exit(run_command("Measures the cost of score centering.", bench))
