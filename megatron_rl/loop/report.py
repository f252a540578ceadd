"""Writes one line of metrics per step: figures that are already final, and the metrics of rollouts
and scores.

A response that a verifier could not score (a timeout, a crash) is counted as a failure and left out
of the reward, the format rate, the advantages and the over-long penalties: it is neither wrong nor
badly formatted, and has no advantage and no penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_rl.config import RewardTerm
from megatron_rl.loop.replicas import Replicas
from megatron_rl.observe.metrics import Max, Metric, Sum, mean_of, reduce
from megatron_rl.observe.recorder import Recorder
from megatron_rl.observe.stopwatch import Stopwatch
from megatron_rl.records import SampledStep
from megatron_rl.reward.registry import rewards_apart, verifiers_apart
from megatron_rl.rollout.routes import route_bytes

NOTHING_SAMPLED = SampledStep(groups=(), num_prompts=0, num_rounds=0)
Measure = Callable[[int, Mapping[str, float], SampledStep], dict[str, float]]
# The phases whose time counts towards tokens per second; evaluations and checkpoints do not count.
STEP_PHASES = ("rollout", "reward", "learner", "sync", "acceptance")


def write_metrics(
    recorder: Recorder,
    stopwatch: Stopwatch,
    replicas: Replicas,
    verifiers: Mapping[str, Sequence[RewardTerm]],
    measure: Measure,
    step: int,
    *known: Mapping[str, float],
    sampled: SampledStep = NOTHING_SAMPLED,
    warning: str | None = None,
) -> None:
    """Record the metrics of a step. A collective over all ranks; rank 0 writes.

    Args:
        stopwatch: measures the seconds of each phase since the last line. A checkpoint is written
            after the line of its step, so its seconds appear in the next line.
        verifiers: of all tasks and files, by their name; if there are several tasks, the reward of
            each is recorded, and if a task has several verifiers, that of each verifier.
        measure: of `loop/machine.py`: step, seconds by phase and rollouts -> figures.
        known: figures that are already final and the same on every head.
        sampled: this replica's rollouts; without groups for an evaluation before the first step.
        warning: a line for the console, after that of the step.
    """
    seconds = stopwatch.take()
    used = measure(step, seconds, sampled)
    if not replicas.is_replica_head:
        return
    metrics = reduce(rollout_metrics(sampled, verifiers), replicas.reducer())
    for each in known:
        metrics |= each
    metrics |= used
    metrics |= {f"speed/seconds/{phase}": value for phase, value in seconds.items()}
    if metrics["rollout/num_tokens"] == 0:  # an evaluation has a line of its own
        del metrics["rollout/num_tokens"], metrics["rollout/num_prompts"]
    else:
        spent = sum(seconds.get(phase, 0.0) for phase in STEP_PHASES)
        metrics["speed/tokens_per_second"] = metrics["rollout/num_tokens"] / spent
        if "speed/num_gpus" in used:
            per_gpu = metrics["speed/tokens_per_second"] / used["speed/num_gpus"]
            metrics["speed/tokens_per_second_per_gpu"] = per_gpu
    recorder.write(step, metrics)
    if warning is not None:
        recorder.say(warning)


def rollout_metrics(
    sampled: SampledStep, verifiers: Mapping[str, Sequence[RewardTerm]]
) -> dict[str, Metric]:
    """Rewards, advantages, lengths and rates of one replica's groups, to be reduced over the
    replicas. They cover all sampled responses; `rollout/kept_rate/mean` is the share of them that
    the learner trains on.
    """
    groups = sampled.groups
    rollouts = [rollout for each in groups for rollout in each.group.rollouts]
    every = [score for each in groups for score in each.scores]
    scored = [score for score in every if score.failure is None]
    lengths = [rollout.num_response_tokens for rollout in rollouts]
    advantages, penalties = (
        [value for value, score in zip(values, every, strict=True) if score.failure is None]
        for values in (
            [value for each in groups for value in each.advantages],
            [value for each in groups for value in each.overlong_penalties],
        )
    )
    metrics: dict[str, Metric] = {
        "reward/mean": mean_of([score.reward for score in scored]),
        "reward/format_rate/mean": mean_of([score.is_formatted for score in scored]),
        "reward/failure_rate/mean": mean_of([score.failure is not None for score in every]),
        "reward/groups_with_signal/mean": mean_of([each.has_signal for each in groups]),
        "advantage/abs/mean": mean_of([abs(value) for value in advantages]),
        "rollout/response_tokens/mean": mean_of(lengths),
        "rollout/response_tokens/max": Max(max(lengths, default=float("-inf"))),
        "rollout/truncation_rate/mean": mean_of([each.is_truncated for each in rollouts]),
        "rollout/num_tokens": Sum(float(sum(lengths))),
        "rollout/route_bytes/mean": mean_of(route_bytes(rollouts)),  # of a response
        "rollout/num_prompts": Sum(float(len(groups))),
        "rollout/num_rounds": Max(sampled.num_rounds or float("-inf")),
        "rollout/kept_rate/mean": mean_of([kept for each in groups for kept in each.is_kept]),
        "reward/overlong_penalty/mean": mean_of(penalties),
    }
    if len(verifiers) > 1:
        for source in verifiers:
            own = [each for each in groups if each.group.prompt.source == source]
            rewards = [s.reward for each in own for s in each.scores if s.failure is None]
            metrics[f"reward/{source}/mean"] = mean_of(rewards)
    metrics |= sampled.metrics
    return metrics | {
        f"reward/verifier/{name}/mean": mean_of(rewards)
        for name, rewards in rewards_apart(scored, verifiers_apart(verifiers)).items()
    }
