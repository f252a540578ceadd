"""avg@k, pass@k and the rates of an evaluation set.

With `n` responses to a question, `c` of them correct, avg@n is the mean of c / n over the
questions, and pass@k is the mean of the unbiased estimator of Chen et al. (arXiv 2107.03374, Eq. 1)

    1 - C(n - c, k) / C(n, k)

of the probability that at least one of k responses is correct.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_rl.observe.metrics import Figures, Metric, mean_of
from megatron_rl.records import ScoredGroup
from megatron_rl.reward.registry import rewards_apart

HELD_OUT = ""  # the name of the set of the held-out prompts


def prefix_of(name: str) -> str:
    """How the metrics of a set begin: `eval/` for the held-out prompts, `eval/<name>/` for a named
    set.
    """
    return "eval/" if name == HELD_OUT else f"eval/{name}/"


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the probability that one of k responses is correct.

    Raises:
        ValueError: k is not in 1 to `num_samples`, or `num_correct` not in 0 to `num_samples`.
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(
            f"expected 1 <= k <= num_samples and 0 <= num_correct <= num_samples, got k={k}, "
            f"num_samples={num_samples}, num_correct={num_correct}"
        )
    # Whole numbers, so that the only rounding is that of the quotient.
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def evaluation_metrics(
    scored: Sequence[ScoredGroup],
    num_samples: int,
    *,
    pass_at: Sequence[int] = (),
    name: str = HELD_OUT,
    verifiers: Sequence[str] = (),
) -> dict[str, Metric]:
    """The metrics of one replica's share of a set, to be reduced over the replicas.

    A response that a verifier could not score counts as a failure and enters no other rate except
    the truncation rate. If fewer than k responses to a question could be scored, all of these are
    taken for its pass@k.

    Args:
        num_samples: responses to each question.
        pass_at: the k of pass@k; (): `num_samples`.
        name: of the set. A named set also has the standard error of avg@k, over its questions, and
            the mean length of its responses.
        verifiers: names of those whose rewards are shown apart, without their weights.
    """
    prefix = prefix_of(name)
    rollouts = [rollout for each in scored for rollout in each.group.rollouts]
    every = [score for each in scored for score in each.scores]
    known = [[score for score in each.scores if score.failure is None] for each in scored]
    all_known = [score for scores in known for score in scores]
    counts = [(len(of), sum(score.is_correct for score in of)) for of in known if of]
    metrics: dict[str, Metric] = {
        f"{prefix}avg_at_{num_samples}": mean_of([score.is_correct for score in all_known])
    }
    for k in pass_at or (num_samples,):
        metrics[f"{prefix}pass_at_{k}"] = mean_of(
            [pass_at_k(size, correct, min(k, size)) for size, correct in counts]
        )
    metrics |= {
        f"{prefix}reward/mean": mean_of([score.reward for score in all_known]),
        f"{prefix}format_rate/mean": mean_of([score.is_formatted for score in all_known]),
        f"{prefix}truncation_rate/mean": mean_of([each.is_truncated for each in rollouts]),
        f"{prefix}failure_rate/mean": mean_of([score.failure is not None for score in every]),
    }
    for verifier, rewards in rewards_apart(all_known, verifiers).items():
        metrics[f"{prefix}reward/verifier/{verifier}/mean"] = mean_of(rewards)
    if name != HELD_OUT:
        metrics[f"{prefix}response_tokens/mean"] = mean_of(
            [rollout.num_response_tokens for rollout in rollouts]
        )
        means = [correct / size for size, correct in counts]
        metrics[f"{prefix}standard_error"] = _standard_error(f"{prefix}standard_error", means)
    return metrics


def _standard_error(key: str, means: Sequence[float]) -> Figures:
    """The standard error of the mean of the questions' own means; no figure for one question."""

    def finish(sums: dict[str, float], _maxima: dict[str, float]) -> dict[str, float]:
        count = sums["count"]
        if count < 2:
            return {}
        squares = max(0.0, sums["squares"] - sums["sum"] ** 2 / count)  # not below 0 by rounding
        return {key: math.sqrt(squares / (count - 1) / count)}

    return Figures(
        sum_names=("count", "sum", "squares"),
        sums=torch.tensor(
            [len(means), sum(means), sum(mean**2 for mean in means)], dtype=torch.float64
        ),
        max_names=(),
        maxima=torch.zeros(0, dtype=torch.float64),
        finish=finish,
    )
