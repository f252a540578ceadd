"""Measures what a correction costs beside truncated importance sampling (TIS) alone.

    python -m tools.bench_corrections configs/quickstart.yaml \\
        objective.preset=score_centering_tis objective.acceptance.enabled=true \\
        run_dir=runs/bench_corrections loop.num_steps=44

This is a real run. In its odd steps the engine sends the heads that score centering needs; in its
even steps it sends none, so an odd step and the next one are a pair for the cost of sampling. In an
odd step the training step is done once with every preset of `MEASURED`, on the same rollouts,
beginning with another one each time. Printed are medians of the ratios to TIS, with the quarter of
the steps below and above, and what the acceptance of an update adds to a whole step. The first
steps are left out.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from omegaconf import OmegaConf

import megatron_rl.train
from megatron_rl.config import Config, ObjectiveConfig
from megatron_rl.config.presets import PRESETS
from megatron_rl.config.schema import build
from megatron_rl.errors import ConfigError
from megatron_rl.learner.update.step import train_step
from megatron_rl.loop.report import STEP_PHASES
from megatron_rl.loop.state import initial_state
from megatron_rl.observe.run_log import read_metrics
from megatron_rl.process.command import Progress, run_command
from megatron_rl.rollout.live import LiveSource
from megatron_rl.rollout.source import RolloutRequest, TakenRollouts

BASE = "tis"
MEASURED = (
    BASE,
    "cis",
    "score_centering",
    "score_centering_tis",
    "dc_grpo",
    "dc_grpo_penalty",
    "dc_grpo_squared_difference",
    "dc_grpo_squared_ratio",
    "dc_grpo_squared_log_ratio",
)
NUM_WARM_UP = 4
MIN_STEPS = NUM_WARM_UP + 10


def has_heads(step: int) -> bool:
    """Whether the engine sends heads in a step."""
    return step % 2 == 1


def objective_of(preset: str) -> ObjectiveConfig:
    """The objective's settings of a preset in a file that sets nothing else."""
    own = PRESETS[preset]["objective"]
    tree = OmegaConf.merge(dataclasses.asdict(ObjectiveConfig()), own)
    return build(ObjectiveConfig, OmegaConf.to_container(tree), (), f"objective.preset={preset}")


class TimedSteps:
    """Stands in for `learner.update.step.train_step`; keeps the seconds by preset and step."""

    def __init__(self) -> None:
        self.objectives = {name: objective_of(name) for name in MEASURED}
        self.seconds: dict[str, dict[int, float]] = {name: {} for name in MEASURED}

    def __call__(self, learner: object, batch: object, dual: object, *_: Any, **rest: Any) -> Any:
        """One step with every preset if the rollouts have heads, else with TIS; the last result."""
        step = rest["step"]
        names = rotated(MEASURED, step // 2) if has_heads(step) else [BASE]
        for name in names:
            objective = self.objectives[name]
            # With a lambda of its own: the measured steps must not move the run's.
            own_dual = initial_state(objective.constraint).dual
            start = time.perf_counter()
            result = train_step(learner, batch, own_dual, objective, **rest)
            self.seconds[name][step] = time.perf_counter() - start
        return result


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names, beginning with another one for every `by`."""
    first = by % len(names)
    return [*names[first:], *names[:first]]


class HeadsInTurn:
    """`LiveSource.take` that requests heads in odd steps only."""

    def __init__(self, num_logprobs: int) -> None:
        self._num_logprobs = num_logprobs
        self._take = LiveSource.take

    def __call__(self, source: LiveSource, request: RolloutRequest) -> TakenRollouts:
        """This replica's share of the rollouts of a step."""
        source._num_logprobs = self._num_logprobs if has_heads(request.step) else 0
        return self._take(source, request)


def bench(config: Config, progress: Progress) -> None:
    """Run the training, and print the costs on rank 0.

    Raises:
        ConfigError: there are too few steps, the engine is asked for no heads, updates are not
            judged, or nothing is sampled.
    """
    objective = config.objective
    is_complete = objective.score_centering.enabled and objective.acceptance.enabled
    if config.loop.num_steps < MIN_STEPS or not is_complete or config.replay:
        raise ConfigError(
            f"bench_corrections: expected loop.num_steps of at least {MIN_STEPS}, score centering, "
            f"acceptance and no replay, got {config.loop.num_steps}, "
            f"objective.score_centering.enabled={objective.score_centering.enabled}, "
            f"objective.acceptance.enabled={objective.acceptance.enabled} and "
            f"replay={config.replay!r}"
        )
    take, timed = HeadsInTurn(objective.score_centering.num_logprobs), TimedSteps()
    with (
        mock.patch.object(megatron_rl.train, "train_step", timed),
        mock.patch.object(LiveSource, "take", lambda source, request: take(source, request)),
    ):
        megatron_rl.train.train(config, progress)
    if os.environ.get("RANK", "0") == "0":
        records = read_metrics(Path(config.run_dir) / "metrics.jsonl")
        for line in (*costs_of_training(timed.seconds), *costs_of_a_run(records)):
            print(line)


def costs_of_training(seconds: Mapping[str, Mapping[int, float]]) -> list[str]:
    """A line for each preset: its training step beside that of TIS on the same rollouts.

    Args:
        seconds: by preset and step.
    """
    lines = []
    base = seconds[BASE]
    for name in seconds:
        steps = [step for step in seconds[name] if step > NUM_WARM_UP and has_heads(step)]
        if name == BASE:
            of_base = statistics.median(base[step] for step in steps)
            lines.append(f"training step of {BASE}: {of_base:.3f} s, {len(steps)} steps")
        else:
            ratios = (seconds[name][step] / base[step] for step in steps)
            lines.append(f"training step of {name}: {_spread(ratios)} times {BASE}")
    return lines


def costs_of_a_run(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sampling with heads beside sampling without; the acceptance beside a whole step of TIS.

    Args:
        records: the lines of metrics of the run, which have the seconds of every phase.
    """
    known = {each["step"]: each for each in records if each["step"] > NUM_WARM_UP}

    def seconds(step: int, *phases: str) -> float:
        return sum(known[step].get(f"speed/seconds/{phase}", 0.0) for phase in phases)

    pairs = [(step, step + 1) for step in known if has_heads(step) and step + 1 in known]
    sampling = (seconds(one, "rollout") / seconds(other, "rollout") for one, other in pairs)
    others = [phase for phase in STEP_PHASES if phase != "acceptance"]
    judging = [
        seconds(step, "acceptance") / seconds(step, *others)
        for step in known
        if not has_heads(step)
    ]
    return [
        f"sampling with heads: {_spread(sampling)} times without, {len(pairs)} pairs",
        f"acceptance: {_spread(judging)} of the other phases of a step of {BASE}, "
        f"{len(judging)} steps",
    ]


def _spread(values: Iterable[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    sys.exit(run_command("Measures the cost of corrections.", bench))
