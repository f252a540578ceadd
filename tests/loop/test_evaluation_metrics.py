"""avg@k, pass@k and the rates of an evaluation, worked by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_rl.loop.evaluation_metrics import evaluation_metrics, pass_at_k
from megatron_rl.observe.metrics import AllReduce, reduce
from megatron_rl.records import Score, ScoredGroup
from tests.fakes.groups import make_group, make_rollout, make_scores, scored


def alone(values: torch.Tensor, operation: str) -> torch.Tensor:
    return values


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3, 2) / C(4, 2) = 1 - 3/6
        (4, 2, 2, 5 / 6),  # 1 - C(2, 2) / C(4, 2) = 1 - 1/6
        (5, 2, 3, 9 / 10),  # 1 - C(3, 3) / C(5, 3) = 1 - 1/10
        (4, 3, 2, 1.0),  # two of four responses always hold a correct one
        (4, 0, 3, 0.0),
        (32, 32, 32, 1.0),
        (32, 1, 32, 1.0),
        (256, 1, 128, 0.5),
    ],
)
def test_pass_at_k_worked_by_hand(num_samples, num_correct, k, expected) -> None:
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, rel=1e-15)


def test_pass_at_k_is_the_share_of_the_choices_of_k_responses_with_a_correct_one() -> None:
    for num_samples, num_correct, k in ((6, 2, 3), (7, 1, 2), (5, 4, 1)):
        responses = [True] * num_correct + [False] * (num_samples - num_correct)
        choices = list(itertools.combinations(responses, k))
        share = sum(map(any, choices)) / len(choices)
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, rel=1e-15)


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1)])
def test_pass_at_k_of_nothing(num_samples, num_correct, k) -> None:
    with pytest.raises(ValueError, match="expected 1 <= k <= num_samples"):
        pass_at_k(num_samples, num_correct, k)


def test_rates_of_two_prompts_with_three_samples() -> None:
    cut = make_rollout(finish_reason="length")
    groups = [
        make_group(0, make_rollout(), cut, make_rollout()),
        make_group(1, *[make_rollout()] * 3),
    ]
    # What could not be scored is a failure, and counts in no other rate.
    failed = tuple(
        Score(reward=reward, is_formatted=False, failure="timeout") for reward in (0.5, 0.0, 0.0)
    )
    judged = [
        ScoredGroup(group=groups[0], scores=make_scores(1.0, 0.0, 1.0)),
        ScoredGroup(group=groups[1], scores=failed),
    ]
    assert reduce(evaluation_metrics(judged, 3), alone) == pytest.approx(
        {
            "eval/avg_at_3": 2 / 3,
            "eval/pass_at_3": 1.0,
            "eval/reward/mean": 2 / 3,
            "eval/format_rate/mean": 2 / 3,
            "eval/truncation_rate/mean": 1 / 6,
            "eval/failure_rate/mean": 3 / 6,
        }
    )


def test_a_named_set_worked_by_hand() -> None:
    """Three questions with 1, 2 and 0 of 4 responses correct."""
    judged = [scored(0, 1, 0, 0, 0), scored(1, 1, 0, 1, 0), scored(2, 0, 0, 0, 0)]
    figures = reduce(evaluation_metrics(judged, 4, pass_at=(1, 2, 4), name="amc23"), alone)
    assert figures == pytest.approx(
        {
            "eval/amc23/avg_at_4": 3 / 12,
            "eval/amc23/pass_at_1": 3 / 12,
            "eval/amc23/pass_at_2": (1 / 2 + 5 / 6 + 0) / 3,
            "eval/amc23/pass_at_4": 2 / 3,
            # means 1/4, 1/2 and 0: variance (0 + 1/16 + 1/16) / 2
            "eval/amc23/standard_error": math.sqrt(1 / 16 / 3),
            "eval/amc23/reward/mean": 3 / 12,
            "eval/amc23/format_rate/mean": 3 / 12,
            "eval/amc23/truncation_rate/mean": 0.0,
            "eval/amc23/failure_rate/mean": 0.0,
            "eval/amc23/response_tokens/mean": 1.0,
        }
    )


def test_each_of_several_verifiers_worked_by_hand() -> None:
    """Four responses, of which one could not be scored: numeric gave 1, 0, 1, exact 1, 0, 0."""
    known = [
        Score(
            reward=first + 0.5 * second,
            is_formatted=True,
            failure=None,
            verifier_rewards=(("numeric", first), ("exact", second)),
        )
        for first, second in ((1.0, 1.0), (0.0, 0.0), (1.0, 0.0))
    ]
    group = make_group(0, *[make_rollout()] * 4)
    judged = [ScoredGroup(group=group, scores=(*known, *make_scores(None)))]
    verifiers = ("numeric", "exact")
    figures = reduce(evaluation_metrics(judged, 4, name="sums", verifiers=verifiers), alone)
    assert figures["eval/sums/reward/verifier/numeric/mean"] == pytest.approx(2 / 3)
    assert figures["eval/sums/reward/verifier/exact/mean"] == pytest.approx(1 / 3)
    assert figures["eval/sums/reward/mean"] == pytest.approx((1.5 + 0 + 1) / 3)


def test_fewer_known_responses_than_k() -> None:
    """Of three responses one could not be scored: pass@3 is that of the other two."""
    figures = reduce(evaluation_metrics([scored(0, None, 1, 0)], 3, pass_at=(1, 3)), alone)
    assert (figures["eval/pass_at_1"], figures["eval/pass_at_3"]) == (0.5, 1.0)


def test_a_replica_without_prompts_takes_part() -> None:
    """More replicas than prompts: equal keys on every rank, or the reduction hangs."""
    one = [scored(0, 1.0)]
    for name in ("", "aime24"):
        some, none = (
            evaluation_metrics(part, 1, name=name, verifiers=("exact",)) for part in (one, [])
        )
        assert some.keys() == none.keys()
        assert reduce(none, alone) == {}


def test_replicas_give_the_figures_of_one() -> None:
    judged = [scored(0, 1, 0), scored(1, 1, 1), scored(2, 0, 0), scored(3, 0, 1)]
    whole = reduce(evaluation_metrics(judged, 2, pass_at=(1, 2), name="a"), alone)

    def with_other(part: list[torch.Tensor]) -> AllReduce:
        """Adds what the other replica, with the last three questions, passes in the same calls."""
        calls = iter(part)
        return lambda values, operation: (
            values + next(calls) if operation == "sum" else torch.maximum(values, next(calls))
        )

    passed: list[torch.Tensor] = []

    def note(values: torch.Tensor, operation: str) -> torch.Tensor:
        passed.append(values.clone())
        return values

    reduce(evaluation_metrics(judged[1:], 2, pass_at=(1, 2), name="a"), note)
    part = evaluation_metrics(judged[:1], 2, pass_at=(1, 2), name="a")
    assert reduce(part, with_other(passed)) == pytest.approx(whole, rel=1e-12)
