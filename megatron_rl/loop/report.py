"""The metrics of a step: what rollouts and scores amount to, over all replicas, and one line of it.

What a verifier could not score (a timeout, a crash) is counted as a failure and left out of every
other rate: it is neither wrong nor badly formatted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from megatron_rl.loop.run import Run
from megatron_rl.observe.metrics import Max, Mean, Metric, Sum, reduce
from megatron_rl.records import RolloutGroup, SampledStep, Score

Groups = Sequence[RolloutGroup]
Scores = Sequence[Sequence[Score]]
Advantages = Sequence[Sequence[float]]

NOTHING_SAMPLED = SampledStep(
    groups=(), scores=(), penalties=(), advantages=(), is_kept=(), num_prompts=0, num_rounds=0
)
# What makes a step; evaluation and checkpoints do not slow the tokens down.
STEP_STATIONS = ("rollout", "reward", "learner", "sync")


def write_metrics(
    run: Run, *known: Mapping[str, float], sampled: SampledStep = NOTHING_SAMPLED
) -> None:
    """One line of metrics for the step: what is known already, and the rollouts' own figures.

    A checkpoint is written after its step's line, so its seconds stand in the next one.
    """
    if not run.parallel.is_replica_head:
        return
    own = rollout_metrics(sampled, sources=run.verifiers)
    metrics = reduce(own, run.parallel.reducer())
    for each in known:
        metrics |= each
    seconds = run.stations.take()
    metrics |= {f"speed/seconds/{station}": value for station, value in seconds.items()}
    if metrics["rollout/num_tokens"] == 0:  # a line of its own for the evaluation at the start
        del metrics["rollout/num_tokens"], metrics["rollout/num_prompts"]
    else:
        spent = sum(seconds.get(station, 0.0) for station in STEP_STATIONS)
        metrics["speed/tokens_per_second"] = metrics["rollout/num_tokens"] / spent
    run.recorder.write(run.step, metrics)


def rollout_metrics(sampled: SampledStep, *, sources: Collection[str]) -> dict[str, Metric]:
    """Reward, advantage, lengths and rates of one replica's groups, to be reduced over the
    replicas; with several sources, the reward of each. Over everything that was sampled;
    `rollout/kept_rate/mean` is the share that is learnt from.
    """
    groups, scores, advantages = sampled.groups, sampled.scores, sampled.advantages
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    flat = [score for of_group in scores for score in of_group]
    scored = [score for score in flat if score.failure is None]
    lengths = [rollout.num_response_tokens for rollout in rollouts]
    metrics: dict[str, Metric] = {
        "reward/mean": mean_of([score.reward for score in scored]),
        "reward/format_rate/mean": mean_of([score.is_formatted for score in scored]),
        "reward/failure_rate/mean": mean_of([score.failure is not None for score in flat]),
        "reward/groups_with_signal/mean": mean_of([any(each) for each in advantages]),
        "advantage/abs/mean": mean_of([abs(value) for each in advantages for value in each]),
        "rollout/response_tokens/mean": mean_of(lengths),
        "rollout/response_tokens/max": Max(max(lengths, default=float("-inf"))),
        "rollout/truncation_rate/mean": mean_of([each.is_truncated for each in rollouts]),
        "rollout/num_tokens": Sum(float(sum(lengths))),
        "rollout/num_prompts": Sum(float(len(groups))),
        "rollout/num_rounds": Max(sampled.num_rounds or float("-inf")),
        "rollout/kept_rate/mean": mean_of([kept for each in sampled.is_kept for kept in each]),
        "reward/overlong_penalty/mean": mean_of([p for each in sampled.penalties for p in each]),
    }
    if len(sources) > 1:
        for source in sources:
            own = [
                score.reward
                for group, of_group in zip(groups, scores, strict=True)
                for score in of_group
                if group.prompt.source == source and score.failure is None
            ]
            metrics[f"reward/{source}/mean"] = mean_of(own)
    return metrics


def evaluation_metrics(groups: Groups, scores: Scores, num_samples: int) -> dict[str, Metric]:
    """avg@k and pass@k of one replica's share of the held-out prompts, and their rates."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    flat = [score for of_group in scores for score in of_group]
    scored = [[score for score in each if score.failure is None] for each in scores]
    known = [score for each in scored for score in each]
    return {
        f"eval/avg_at_{num_samples}": mean_of([score.is_correct for score in known]),
        f"eval/pass_at_{num_samples}": mean_of(
            [any(score.is_correct for score in each) for each in scored if each]
        ),
        "eval/reward/mean": mean_of([score.reward for score in known]),
        "eval/format_rate/mean": mean_of([score.is_formatted for score in known]),
        "eval/truncation_rate/mean": mean_of([each.is_truncated for each in rollouts]),
        "eval/failure_rate/mean": mean_of([score.failure is not None for score in flat]),
    }


def mean_of(values: Sequence[float | bool]) -> Mean:
    """The mean of this rank's values, to be reduced with the other ranks'."""
    return Mean(sum=float(sum(values)), count=len(values))
