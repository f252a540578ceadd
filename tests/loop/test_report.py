"""avg@k and pass@k, worked by hand."""

from __future__ import annotations

import pytest

from megatron_rl.loop.report import evaluation_metrics
from megatron_rl.observe.metrics import reduce
from megatron_rl.records import Prompt, Rollout, RolloutGroup, Score


def make_group(index: int, finish_reasons: tuple[str, ...]) -> RolloutGroup:
    prompt = Prompt(index=index, source="task", text="1+1=", token_ids=(1, 5), answer="2")
    rollouts = tuple(
        Rollout(
            token_ids=(1, 5, 6),
            loss_mask=(False, False, True),
            rollout_logprobs=(0.0, 0.0, -0.5),
            weight_versions=(-1, -1, 0),
            finish_reason=reason,
            text="2",
        )
        for reason in finish_reasons
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


def make_scores(*rewards: float, failure: str | None = None) -> tuple[Score, ...]:
    return tuple(
        Score(reward=reward, is_formatted=reward > 0, failure=failure) for reward in rewards
    )


def test_rates_of_two_prompts_with_three_samples() -> None:
    groups = [make_group(0, ("stop", "length", "stop")), make_group(1, ("stop",) * 3)]
    # What could not be scored is a failure, and counts in no other rate.
    scores = [make_scores(1.0, 0.0, 1.0), make_scores(0.5, 0.0, 0.0, failure="timeout")]
    metrics = reduce(evaluation_metrics(groups, scores, 3), lambda values, operation: values)
    assert metrics == pytest.approx(
        {
            "eval/avg_at_3": 2 / 3,
            "eval/pass_at_3": 1.0,
            "eval/reward/mean": 2 / 3,
            "eval/format_rate/mean": 2 / 3,
            "eval/truncation_rate/mean": 1 / 6,
            "eval/failure_rate/mean": 3 / 6,
        }
    )


def test_a_replica_without_prompts_takes_part() -> None:
    """More replicas than held-out prompts: equal keys on every rank, or the reduction hangs."""
    some = evaluation_metrics([make_group(0, ("stop",))], [make_scores(1.0)], 1)
    none = evaluation_metrics([], [], 1)
    assert some.keys() == none.keys()
    assert reduce(none, lambda values, operation: values) == {}
