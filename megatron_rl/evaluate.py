"""Held-out prompts in, avg@k and pass@k out, at the evaluation's own sampling settings."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.config import EvalConfig
from megatron_rl.observe.metrics import Mean, Metric
from megatron_rl.records import Prompt, RolloutGroup, Score
from megatron_rl.reward.score import Scorer
from megatron_rl.rollout.client import RolloutClient, sampling_seed

# evaluation's seeds do not depend on the step, so that two evaluations differ by the weights alone
EVAL_STEP = -1


def evaluate(
    client: RolloutClient,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    *,
    seed: int,
) -> dict[str, Metric]:
    """Metrics of these prompts, to be reduced over the replicas that share the held-out set.

    Returns:
        `eval/avg_at_<k>` (share of correct samples), `eval/pass_at_<k>` (share of prompts with a
        correct sample), `eval/reward/mean`, `eval/format_rate/mean`, `eval/truncation_rate/mean`,
        `eval/failures`.
    """
    groups = client.generate(
        prompts,
        config.sampling,
        num_samples=config.num_samples,
        seeds=[sampling_seed(seed, EVAL_STEP, prompt.index) for prompt in prompts],
    )
    return evaluation_metrics(groups, scorer.score(groups), config.num_samples)


def evaluation_metrics(
    groups: Sequence[RolloutGroup], scores: Sequence[Sequence[Score]], num_samples: int
) -> dict[str, Metric]:
    """What the scores of the groups amount to; a sample is correct at a reward of 1 or more."""
    flat = [score for of_group in scores for score in of_group]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    correct = [[score.reward >= 1.0 for score in of_group] for of_group in scores]
    return {
        f"eval/avg_at_{num_samples}": _mean([is_right for each in correct for is_right in each]),
        f"eval/pass_at_{num_samples}": _mean([any(each) for each in correct]),
        "eval/reward/mean": _mean([score.reward for score in flat]),
        "eval/format_rate/mean": _mean([score.is_formatted for score in flat]),
        "eval/truncation_rate/mean": _mean([each.finish_reason == "length" for each in rollouts]),
        "eval/failure_rate/mean": _mean([score.failure is not None for score in flat]),
    }


def _mean(values: Sequence[float | bool]) -> Mean:
    return Mean(sum=float(sum(values)), count=len(values))
