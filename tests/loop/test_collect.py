"""Rounds of sampling, and what is made of scored rollouts: the over-long penalty, what is kept,
which groups have signal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

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
from megatron_rl.loop.collect import collect_step, has_signal, judge
from megatron_rl.loop.state import LoopState
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.records import JudgedGroup, SampledStep, ScoredGroup
from megatron_rl.rollout.source import RolloutRequest, TakenRollouts
from tests.fakes.groups import make_group, make_rollout, make_scores, scored
from tests.fakes.learner import FakeParallel

MAX_TOKENS = 10


def make_config(*, is_dynamic: bool = False, max_rounds: int = 10, **overlong: float) -> Config:
    dynamic = DynamicSamplingConfig(enabled=is_dynamic, max_rounds=max_rounds)
    return Config(
        loop=LoopConfig(prompts_per_step=4, samples_per_prompt=2, dynamic_sampling=dynamic),
        reward=RewardConfig(overlong=OverlongConfig(**overlong)),
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
    ("rewards", "is_kept"),
    [
        ([1.0, 0.0], True),
        ([1.0, 1.0], False),
        ([0.0, 0.0], False),
        ([None, 1.0], False),  # a failure gets the others' mean, so nothing differs
    ],
)
def test_groups_without_signal_are_dropped(rewards: list[float | None], is_kept: bool) -> None:
    judged = judge_with(rewards, [3, 4], is_dynamic=True)
    assert judged.is_kept == (is_kept, is_kept)
    assert len(judged.advantages) == 2  # its discrepancy is measured all the same


def test_length_makes_signal() -> None:
    """Two right answers, one of them 2 of 4 tokens into the buffer; the third failed."""
    judged = judge_with([1.0, 1.0, None], [3, 8, 8], is_dynamic=True, buffer_tokens=4, penalty=1.0)
    assert judged.overlong_penalties == (0.0, -0.5, -0.5)
    # Rewards 1, 0.5 and their mean.
    assert judged.advantages == pytest.approx([1.2247, -1.2247, 0.0], abs=1e-4)
    assert judged.is_kept == (True, True, True)
    assert [score.reward for score in judged.scores] == [1.0, 1.0, 0.0]  # as the verifier said


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
    assert has_signal([0.0, 0.5], [True, True])
    assert not has_signal([0.0, 0.5], [True, False])
    assert not has_signal([], [])


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
    parallel = FakeParallel(is_replica_head=False, head_value=((4, 1, 4), False))
    sampled = collect_step(None, parallel, make_state(), make_config(is_dynamic=True), phase)
    assert (sampled.groups, sampled.num_prompts, sampled.num_rounds) == ((), 4, 1)
    assert parallel.log == ["from_replica_head"]
