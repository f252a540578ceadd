"""Rounds of sampling, and what is made of scored rollouts: the over-long penalty, what is kept,
which groups have signal.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_rl.config import (
    Config,
    DynamicSamplingConfig,
    LoopConfig,
    OverlongConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
)
from megatron_rl.errors import EngineError, EnginesLostError, RewardError
from megatron_rl.loop.collect import collect_step, has_signal, judge
from megatron_rl.loop.state import LoopState
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.records import JudgedGroup, SampledStep, ScoredGroup
from megatron_rl.rollout.source import RolloutRequest, TakenRollouts
from tests.fakes.groups import make_group, make_rollout, make_scores, scored
from tests.fakes.learner import FakeParallel

MAX_TOKENS = 10


def make_config(
    *,
    is_dynamic: bool = False,
    max_rounds: int = 10,
    truncated_reward: float | None = None,
    **overlong: float,
) -> Config:
    dynamic = DynamicSamplingConfig(enabled=is_dynamic, max_rounds=max_rounds)
    return Config(
        loop=LoopConfig(prompts_per_step=4, samples_per_prompt=2, dynamic_sampling=dynamic),
        reward=RewardConfig(truncated_reward=truncated_reward, overlong=OverlongConfig(**overlong)),
        rollout=RolloutConfig(sampling=SamplingConfig(max_tokens=MAX_TOKENS)),
    )


def group_of(rewards: Sequence[float | None], lengths: Sequence[int]) -> ScoredGroup:
    """Responses of so many tokens; those of MAX_TOKENS were cut."""
    rollouts = [
        make_rollout(length, finish_reason="length" if length == MAX_TOKENS else "stop")
        for length in lengths
    ]
    return ScoredGroup(group=make_group(0, *rollouts), scores=make_scores(*rewards))


def judge_with(
    rewards: Sequence[float | None], lengths: Sequence[int], **settings: float
) -> JudgedGroup:
    return judge(group_of(rewards, lengths), make_config(**settings))


def test_by_default_everything_is_kept() -> None:
    judged = judge_with([1.0, 1.0], [3, MAX_TOKENS])
    assert judged.is_kept == (True, True)
    assert judged.overlong_penalties == (0.0, 0.0)
    assert judged.advantages == (0.0, 0.0)


@pytest.mark.parametrize(
    ("rewards", "has_signal"),
    [
        ([1.0, 0.0], True),
        ([1.0, 1.0], False),
        ([0.0, 0.0], False),
        ([0.1 + 0.2, 0.3], False),
        ([0.1 + 0.2, 0.3, 0.3, 0.3], False),
        ([0.7 + 0.1, 0.8], False),
        ([sum([0.1] * 10), 1.0], False),
        ([0.7 * 1 + 0.3 * 0.5, 0.85], False),
        ([1e9, 1e9 + 1e-6], False),
        ([-0.0, 0.0], False),
        ([1e-6, 0.0], True),
        ([0.8, 0.8001], True),
    ],
)
def test_groups_without_signal_are_dropped(rewards: list[float], has_signal: bool) -> None:
    lengths = [3 + index for index in range(len(rewards))]
    judged = judge_with(rewards, lengths, is_dynamic=True)
    assert judged.is_kept == (has_signal,) * len(rewards)
    assert judged.has_signal == judge_with(rewards, lengths).has_signal == has_signal
    assert len(judged.advantages) == len(rewards)  # its discrepancy is measured all the same


LENGTHS = [2, 3, 9, MAX_TOKENS]  # with a buffer of 5: two responses near the limit


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_length_makes_no_signal(reward: float) -> None:
    """DAPO judges by the number of correct responses, of which there are none, or all."""
    penalty = {"buffer_tokens": 5, "penalty": 1.0}
    judged = judge_with([reward] * 4, LENGTHS, is_dynamic=True, **penalty)
    assert judged.overlong_penalties == pytest.approx((0.0, 0.0, -0.8, -1.0))
    assert not judged.has_signal and not any(judged.is_kept)
    # Without dynamic sampling the penalty is learnt from: rewards 0, 0, -0.8, -1, mean -0.45.
    kept = judge_with([reward] * 4, LENGTHS, **penalty)
    deviation = math.sqrt((2 * 0.45**2 + 0.35**2 + 0.55**2) / 4)
    expected = [0.45 / deviation, 0.45 / deviation, -0.35 / deviation, -0.55 / deviation]
    assert kept.advantages == pytest.approx(expected, rel=1e-4)
    assert kept.is_kept == (True,) * 4 and not kept.has_signal


def test_signal_and_penalty_together() -> None:
    penalty = {"buffer_tokens": 5, "penalty": 1.0}
    judged = judge_with([0.0, 0.0, 1.0, 1.0], LENGTHS, is_dynamic=True, **penalty)
    assert judged.is_kept == (True,) * 4
    # A penalty that cancels the difference of the scores does not take their signal away.
    cancelled = judge_with([0.0, 1.0], [3, MAX_TOKENS], is_dynamic=True, **penalty)
    assert cancelled.advantages == (0.0, 0.0)
    assert cancelled.is_kept == (True, True)


def test_a_reward_of_the_group_makes_no_signal() -> None:
    group = group_of([1.0, 1.0], [3, 8])
    shorter = replace(group.scores[0], group_reward=0.5)
    longer = replace(group.scores[1], group_reward=-0.5)
    scored_group = replace(group, scores=(shorter, longer))
    judged = judge(scored_group, make_config())
    assert judged.advantages == pytest.approx((1.0, -1.0), rel=1e-5)
    assert not judged.has_signal
    assert judge(scored_group, make_config(is_dynamic=True)).is_kept == (False, False)


@pytest.mark.parametrize(
    ("rewards", "has_signal"),
    [
        ([0.0, 0.0, -1.0], False),  # two wrong, one cut: none is correct
        ([1.0, 1.0, -1.0], True),
        ([-1.0, -1.0, -0.5], False),  # of a verifier whose lowest score is -1
        ([0.0, 1.0, -1.0], True),
    ],
)
def test_a_response_that_no_verifier_saw_counts_as_wrong(
    rewards: list[float], has_signal: bool
) -> None:
    judged = judge_with(rewards, [3, 4, MAX_TOKENS], is_dynamic=True, truncated_reward=rewards[2])
    assert judged.has_signal == has_signal
    all_cut = judge_with([-1.0] * 2, [MAX_TOKENS] * 2, is_dynamic=True, truncated_reward=-1.0)
    assert not all_cut.has_signal


def test_failures_take_no_part_in_their_group() -> None:
    """Two scored responses of eight: mean 1/2 and deviation 1/2 are theirs alone."""
    judged = judge_with([1.0, 0.0, *[None] * 6], [3, 4, *[5] * 6])
    assert judged.advantages[:2] == pytest.approx((1.0, -1.0), rel=1e-5)
    assert judged.advantages[2:] == (0.0,) * 6
    assert judged.is_kept == (True, True, *(False,) * 6)
    assert judged.has_signal
    assert [sample.is_kept for sample in judged.samples()] == [True, True, *[False] * 6]


def test_failures_among_penalties() -> None:
    """Two right answers, one of them 2 of 4 tokens into the buffer; the third failed."""
    judged = judge_with([1.0, 1.0, None], [3, 8, 8], buffer_tokens=4, penalty=1.0)
    assert judged.overlong_penalties == (0.0, -0.5, 0.0)
    # Rewards 1 and 0.5: deviation 1/4.
    assert judged.advantages == pytest.approx([1.0, -1.0, 0.0], rel=1e-5)
    assert judged.is_kept == (True, True, False)
    assert [score.reward for score in judged.scores] == [1.0, 1.0, 0.0]  # as the verifier said


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_groups_with_one_scored_response_or_none(is_dynamic: bool) -> None:
    one = judge_with([None, 1.0], [3, 4], is_dynamic=is_dynamic)
    assert one.advantages == (0.0, 0.0)
    assert one.is_kept == (False, not is_dynamic)
    none = judge_with([None, None], [3, 4], is_dynamic=is_dynamic)
    assert none.advantages == (0.0, 0.0)
    assert none.is_kept == (False, False)
    assert not one.has_signal and not none.has_signal


def test_cut_responses_are_masked_and_give_no_signal() -> None:
    lengths = [3, 4, MAX_TOKENS]
    judged = judge_with([1.0, 0.0, 0.0], lengths, mask_truncated=True)
    assert judged.is_kept == (True, True, False)
    assert judged.advantages[2] < 0  # it belongs to its group's mean
    equal = judge_with([1.0, 1.0, 1.0], lengths, mask_truncated=True)
    assert equal.is_kept == (True, True, False)
    dynamic = judge_with([1.0, 0.0, 0.0], lengths, is_dynamic=True, mask_truncated=True)
    assert dynamic.is_kept == (True, True, False)
    dropped = judge_with([1.0, 1.0, 1.0], lengths, is_dynamic=True, mask_truncated=True)
    assert dropped.is_kept == (False, False, False)


def test_signal_of_a_masked_response_does_not_count() -> None:
    group, config = group_of([0.0, 0.5, 1.0], [3, 4, 5]), RewardConfig()
    assert has_signal(group, [True, False, False], config)
    assert not has_signal(group, [False, True, False], config)  # it equals the mean
    assert not has_signal(group, [False] * 3, config)


class FakeSource:
    """Prompts whose index is in `without_signal` give equal rewards; one replica of all prompts."""

    def __init__(self, without_signal: Sequence[int] = (), *, num_rounds: int = 1) -> None:
        self.requests: list[RolloutRequest] = []
        self._without_signal = set(without_signal)
        self._num_rounds = num_rounds

    def take(self, request: RolloutRequest) -> TakenRollouts:
        self.requests.append(request)
        first, count = request.first_prompt, request.num_prompts
        groups = tuple(
            scored(index, 1.0, 1.0 if index in self._without_signal else 0.0)
            for index in range(first, first + count)
        )
        return TakenRollouts(
            groups=groups,
            num_prompts=count,
            num_rounds=self._num_rounds,
            is_whole_step=self._num_rounds == 0,
        )


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    assert name == "rollout"
    return contextlib.nullcontext()


def make_state() -> LoopState:
    return LoopState(dual=DualVariable(0.1), step=3, next_prompt=8, published_version=2)


def collect(source: FakeSource, **settings: float) -> SampledStep:
    return collect_step(source, FakeParallel(), make_state(), make_config(**settings), phase)


def test_one_round_takes_the_prompts_of_a_step() -> None:
    source, state = FakeSource([8]), make_state()
    sampled = collect_step(source, FakeParallel(), state, make_config(), phase)
    assert source.requests == [
        RolloutRequest(step=3, first_prompt=8, num_prompts=4, weight_version=2)
    ]
    assert [each.group.prompt.index for each in sampled.groups] == [8, 9, 10, 11]
    assert (sampled.num_prompts, sampled.num_rounds) == (4, 1)
    assert state.next_prompt == 8  # the caller advances the cursor
    assert [sample.prompt_index for sample in sampled.samples()] == [8, 8, 9, 9, 10, 10, 11, 11]


class LosingSource(FakeSource):
    """Has too few engines the first times that it is asked."""

    num_failures = 1

    def take(self, request: RolloutRequest) -> TakenRollouts:
        taken = super().take(request)
        if len(self.requests) <= self.num_failures:
            raise EnginesLostError("none is left")
        return taken


def test_a_round_begins_again_when_engines_were_brought_back() -> None:
    told: list[str] = []

    def restore(shortage: str) -> bool:
        told.append(shortage)
        return bool(shortage)

    source = LosingSource()
    sampled = collect_step(source, FakeParallel(), make_state(), make_config(), phase, restore)
    assert told == ["none is left", ""]
    assert source.requests[0] == source.requests[1]
    assert [each.group.prompt.index for each in sampled.groups] == [8, 9, 10, 11]
    # Another rank has too few: what this one has is kept, and this one goes along.
    answers = iter([True, False])
    source = FakeSource()
    collect_step(
        source, FakeParallel(), make_state(), make_config(), phase, lambda _: next(answers)
    )
    assert len(source.requests) == 1
    with pytest.raises(EngineError, match="none is left"):
        collect_step(LosingSource(), FakeParallel(), make_state(), make_config(), phase)


def test_rounds_go_on_until_enough_groups_have_signal() -> None:
    source = FakeSource([8, 9, 12])
    sampled = collect_step(
        source, FakeParallel(), make_state(), make_config(is_dynamic=True), phase
    )
    asked = [(request.first_prompt, request.num_prompts) for request in source.requests]
    assert asked == [(8, 4), (12, 2), (14, 1)]
    assert (sampled.num_prompts, sampled.num_rounds, len(sampled.groups)) == (7, 3, 7)
    assert sum(any(each.is_kept) for each in sampled.groups) == 4


def test_what_other_replicas_kept_counts() -> None:
    source, parallel = FakeSource([8, 9]), FakeParallel(others=2.0)
    sampled = collect_step(source, parallel, make_state(), make_config(is_dynamic=True), phase)
    assert len(source.requests) == 1  # two groups here and two elsewhere
    assert parallel.log == ["reduce sum", "from_replica_head"]
    assert sampled.num_rounds == 1


def test_rounds_end_at_their_bound() -> None:
    source = FakeSource(range(100))
    config = make_config(is_dynamic=True, max_rounds=3)
    sampled = collect_step(source, FakeParallel(), make_state(), config, phase)
    assert (len(source.requests), sampled.num_prompts) == (3, 12)
    assert not any(any(each.is_kept) for each in sampled.groups)


def test_a_recorded_step_is_taken_whole() -> None:
    source = FakeSource([8, 9], num_rounds=0)
    sampled = collect_step(
        source, FakeParallel(), make_state(), make_config(is_dynamic=True), phase
    )
    assert len(source.requests) == 1
    assert sampled.num_rounds == 0


def test_a_rank_that_is_no_head_learns_the_counts() -> None:
    parallel = FakeParallel(is_replica_head=False, head_value=((4, 1, 4, 8, 8), False))
    sampled = collect_step(None, parallel, make_state(), make_config(is_dynamic=True), phase)
    assert (sampled.groups, sampled.num_prompts, sampled.num_rounds) == ((), 4, 1)
    assert parallel.log == ["from_replica_head"]


class FailingSource(FakeSource):
    """None of its responses could be scored, except in the rounds from `first_scored` on."""

    def __init__(self, first_scored: int) -> None:
        super().__init__()
        self._first_scored = first_scored

    def take(self, request: RolloutRequest) -> TakenRollouts:
        taken = super().take(request)
        if len(self.requests) > self._first_scored:
            return taken
        groups = tuple(scored(each.group.prompt.index, None, None) for each in taken.groups)
        return replace(taken, groups=groups)


def test_a_step_without_a_single_score_ends_the_run() -> None:
    config, state = make_config(), make_state()
    with pytest.raises(RewardError) as caught:
        collect_step(
            *(FailingSource(1), FakeParallel(), state, config, phase),
            failure=lambda: "prompt 8 of sums, verifier own:fn: KeyError: 'x'",
        )
    assert str(caught.value) == (
        "reward: expected scores for step 3, got none: none of its 8 responses could be scored; "
        "prompt 8 of sums, verifier own:fn: KeyError: 'x'"
    )
    # Another replica, or a later round, has scores.
    collect_step(FailingSource(1), FakeParallel(others=2.0), state, config, phase)
    collect_step(FailingSource(1), FakeParallel(), state, make_config(is_dynamic=True), phase)
    with pytest.raises(RewardError, match="none of its 24 responses"):
        collect_step(
            *(FailingSource(9), FakeParallel(), state),
            *(make_config(is_dynamic=True, max_rounds=3), phase),
        )
    # A rank that is no head leaves the report to one that knows the cause.
    parallel = FakeParallel(is_replica_head=False, head_value=((4, 1, 0, 8, 0), False))
    assert collect_step(None, parallel, state, config, phase).groups == ()
