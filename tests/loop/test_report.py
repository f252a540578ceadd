"""The line of metrics of a step, from rollouts made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rl.config import RewardTerm
from megatron_rl.loop.report import NOTHING_SAMPLED, rollout_metrics, write_metrics
from megatron_rl.observe.metrics import reduce
from megatron_rl.observe.stopwatch import Stopwatch
from megatron_rl.records import SampledStep
from tests.fakes.groups import judged, scored
from tests.fakes.learner import FakeParallel


class FakeRecorder:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.said: list[str] = []

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, metrics))

    def say(self, message: str) -> None:
        self.said.append(message)


TERMS = (RewardTerm(verifier="exact"), RewardTerm(verifier="own:fn", weight=0.5))


def by(*sources: str) -> dict[str, tuple[RewardTerm, ...]]:
    return dict.fromkeys(sources, TERMS[:1])


def make_step() -> SampledStep:
    groups = (
        judged(scored(0, 1.0, 0.0, source="sums"), 1.0, -1.0, has_signal=True),
        judged(scored(1, 1.0, None, source="words"), 0.0, 0.0),
    )
    return SampledStep(groups=groups, num_prompts=2, num_rounds=1)


def measured(step: int, seconds: object, sampled: object) -> dict[str, float]:
    """In place of `loop/machine.py`, which tests/loop/test_machine.py tests."""
    return {}


def write(
    sampled: SampledStep, *known: dict[str, float], parallel: FakeParallel | None = None
) -> list[tuple[int, dict[str, float]]]:
    recorder, stopwatch = FakeRecorder(), Stopwatch()
    with stopwatch.time("learner"):
        pass
    write_metrics(
        recorder,
        stopwatch,
        parallel or FakeParallel(),
        by("sums"),
        measured,
        7,
        *known,
        sampled=sampled,
    )
    return recorder.lines


def test_figures_of_the_rollouts() -> None:
    [(step, line)] = write(make_step(), {"discrepancy/mean": 0.004}, {"sync/probe_gap/mean": 0.1})
    assert step == 7
    expected = {
        "reward/mean": 2 / 3,  # what a verifier could not score is left out
        "reward/format_rate/mean": 2 / 3,
        "reward/failure_rate/mean": 1 / 4,
        "reward/groups_with_signal/mean": 1 / 2,
        "advantage/abs/mean": 2 / 3,
        "rollout/response_tokens/mean": 1.0,
        "rollout/response_tokens/max": 1.0,
        "rollout/truncation_rate/mean": 0.0,
        "rollout/num_tokens": 4.0,
        "rollout/num_prompts": 2.0,
        "rollout/num_rounds": 1.0,
        "rollout/kept_rate/mean": 1.0,
        "reward/overlong_penalty/mean": 0.0,
        "discrepancy/mean": 0.004,
        "sync/probe_gap/mean": 0.1,
    }
    assert {key: line[key] for key in expected} == pytest.approx(expected)
    assert line["speed/tokens_per_second"] == pytest.approx(4 / line["speed/seconds/learner"])
    assert line.keys() == expected.keys() | {"speed/tokens_per_second", "speed/seconds/learner"}


def test_advantages_made_by_a_penalty_are_no_signal() -> None:
    """And a response that could not be scored has neither an advantage nor a penalty."""
    wrong = replace(
        judged(scored(0, 0.0, 0.0, None), 1.0, -1.0, 0.0),
        overlong_penalties=(0.0, -0.5, 0.0),
        is_kept=(True, True, False),
    )
    sampled = SampledStep(groups=(wrong,), num_prompts=1, num_rounds=1)
    reduced = reduce(rollout_metrics(sampled, by("task")), FakeParallel().reducer())
    assert reduced["reward/groups_with_signal/mean"] == 0.0
    assert reduced["advantage/abs/mean"] == 1.0
    assert reduced["reward/overlong_penalty/mean"] == -0.25
    assert reduced["rollout/kept_rate/mean"] == pytest.approx(2 / 3)


def test_the_reward_of_each_verifier() -> None:
    """Without its weight; "sums" has one verifier, which is no part of it."""
    group = scored(0, 1.25, 0.5, None, source="both")
    rewards = ((1.0, 0.5), (0.0, 1.0), None)
    scores = tuple(
        score
        if each is None
        else replace(score, verifier_rewards=(("exact", each[0]), ("own:fn", each[1])))
        for score, each in zip(group.scores, rewards, strict=True)
    )
    groups = (judged(replace(group, scores=scores), 1.0, -1.0, 0.0), *make_step().groups)
    sampled = SampledStep(groups=groups, num_prompts=3, num_rounds=1)
    reduced = reduce(
        rollout_metrics(sampled, by("sums", "words") | {"both": TERMS}), FakeParallel().reducer()
    )
    assert reduced["reward/verifier/exact/mean"] == 0.5
    assert reduced["reward/verifier/own:fn/mean"] == 0.75
    assert reduced["reward/both/mean"] == 0.875


def test_the_reward_of_each_source() -> None:
    found = rollout_metrics(make_step(), by("sums", "words", "none"))
    reduced = reduce(found, FakeParallel().reducer())
    assert reduced["reward/sums/mean"] == 0.5
    assert reduced["reward/words/mean"] == 1.0
    assert "reward/none/mean" not in reduced


def test_an_evaluation_before_the_first_step_has_a_line_of_its_own() -> None:
    [(_, line)] = write(NOTHING_SAMPLED, {"eval/avg_at_8": 0.5})
    assert line.keys() == {"eval/avg_at_8", "speed/seconds/learner"}


def test_a_warning_is_a_line_of_the_console() -> None:
    recorder = FakeRecorder()
    for step, warning in ((1, None), (2, "warning: lambda has been")):
        write_metrics(
            recorder, Stopwatch(), FakeParallel(), by("sums"), measured, step, {}, warning=warning
        )
    assert recorder.said == ["warning: lambda has been"] and len(recorder.lines) == 2


def test_only_heads_of_replicas_report() -> None:
    assert write(make_step(), parallel=FakeParallel(is_replica_head=False)) == []


def test_every_rank_holds_the_same_keys() -> None:
    verifiers = by("sums", "words") | {"both": TERMS}
    with_groups = rollout_metrics(make_step(), verifiers)
    without = rollout_metrics(NOTHING_SAMPLED, verifiers)
    assert with_groups.keys() == without.keys()
