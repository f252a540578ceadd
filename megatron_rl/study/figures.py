"""The figures of finished runs that a study compares; NaN stands for one that a run lacks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]  # a step of a run: its engine, arm, seed and step, and its metrics
ENTROPY_WINDOW = 0.05  # largest relative difference between two "equal" entropies
MIN_MATCHED = 3  # least number of steps for a comparison at equal entropy
FIRST_STEPS = 10  # left out of it: with old rollouts the gap needs a few steps to build up


def runs_of(records: Sequence[Record], arm: str) -> list[list[Record]]:
    """The records of an arm: one list per seed."""
    of_arm = [each for each in records if each["arm"] == arm]
    seeds = dict.fromkeys(each["seed"] for each in of_arm)
    return [[each for each in of_arm if each["seed"] == seed] for seed in seeds]


def at_start(run: Sequence[Record], key: str) -> float:
    """The first value of a metric in a run; NaN if there is none."""
    return next((each[key] for each in run if each.get(key) is not None), math.nan)


def at_end(run: Sequence[Record], key: str) -> float:
    """The last value of a metric in a run; NaN if there is none."""
    return at_start(run[::-1], key)


def mean_after(run: Sequence[Record], key: str, step: int) -> float:
    """The mean of a metric over the steps after `step`; NaN if there is none."""
    found = [each[key] for each in run if each["step"] > step and each.get(key) is not None]
    return statistics.mean(found) if found else math.nan


def late_reward(run: Sequence[Record]) -> float:
    """The mean reward on training prompts over the last third of the steps. It is a mean over many
    more samples and versions of the policy than avg@8 at the end, and so tells arms apart better.
    """
    last = run[-1]["step"]
    return mean_after(run, "reward/mean", last - max(1, last // 3))


def above(run: Sequence[Record], baseline: Sequence[Record] | None) -> float:
    """How much higher the late reward of a run is than that of the baseline's run with the same
    seed, which has the same prompts and initial weights; NaN without one, and for the baseline.
    """
    if baseline is None or run[0]["arm"] == baseline[0]["arm"]:
        return math.nan
    return late_reward(run) - late_reward(baseline)


def at_same_entropy(run: Sequence[Record], other: Sequence[Record], last: int) -> float:
    """The mean discrepancy of another run at the entropy that this run has at its end.

    A sharper policy has a smaller gap for any objective, so gaps are compared at equal entropy.

    Args:
        run: its entropy is the mean over the steps after `last`.
        other: a run with the same seed, of which the steps with this entropy are used, except for
            the first ones.
    Returns:
        NaN if the other run has too few such steps.
    """
    entropy = mean_after(run, "loss/entropy/mean", last)
    near = [
        each["discrepancy/mean"]
        for each in other
        if each["step"] > FIRST_STEPS
        and abs(each["loss/entropy/mean"] - entropy) <= ENTROPY_WINDOW * entropy
    ]
    return statistics.mean(near) if len(near) >= MIN_MATCHED else math.nan


def is_close(records: Sequence[Record], first: str, other: str) -> bool:
    """Whether the late reward of two arms differs by at most two standard errors of the difference,
    over the seeds that are finished. With fewer than two seeds it is not known.
    """
    ends = [[late_reward(run) for run in runs_of(records, arm)] for arm in (first, other)]
    if min(len(each) for each in ends) < 2:
        return False
    difference = statistics.mean(ends[0]) - statistics.mean(ends[1])
    variance = sum(statistics.variance(each) / len(each) for each in ends)
    return abs(difference) <= 2 * math.sqrt(variance)


def with_error(values: Sequence[float]) -> str:
    """The mean over seeds and its standard error, e.g. `0.801 ± 0.004`; NaN values are left out."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    mean = statistics.mean(known)
    if len(known) == 1:
        return f"{mean:.3g}"
    return f"{mean:.3g} ± {statistics.stdev(known) / math.sqrt(len(known)):.1g}"
