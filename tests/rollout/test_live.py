"""A step sampled from a fake pool: whose prompts, which seeds, which weights, timed where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest

from megatron_rl.config import SamplingConfig
from megatron_rl.engine.requests import Sampler
from megatron_rl.errors import DataError, EngineError, EnginesLostError
from megatron_rl.records import Prompt, Rollout, RolloutGroup, Score
from megatron_rl.rollout.environment import Environment, EpisodeRequest
from megatron_rl.rollout.live import LiveSource, check_versions, sample_groups
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.rollout.single_turn import SingleTurn
from megatron_rl.rollout.source import RolloutRequest, RolloutSource, TakenRollouts
from tests.fakes.engine_pool import FakePool
from tests.fakes.environment import TwoTurns
from tests.rollout.groups import make_prompt

SAMPLING = SamplingConfig(max_tokens=5)
REQUEST = RolloutRequest(step=3, first_prompt=10, num_prompts=5, weight_version=2)


class Setting:
    """A source on fakes, and what it did with them."""

    def __init__(
        self,
        replica: int = 0,
        num_replicas: int = 1,
        version: int = 2,
        num_logprobs: int = 0,
        environment: Environment | None = None,
    ) -> None:
        self.pool = FakePool(("http://a", "http://b"), weight_version=version)
        self.events: list[str] = []
        self.source: RolloutSource = LiveSource(
            self._prompts,
            environment or SingleTurn(str),
            self.pool,
            self._score,
            sampling=SAMPLING,
            num_samples=2,
            seed=11,
            share=lambda count: share(count, replica, num_replicas),
            time=self._time,
            num_logprobs=num_logprobs,
        )

    def _prompts(self, first: int, count: int) -> list[Prompt]:
        self.events.append("prompts")
        return [make_prompt(index) for index in range(first, first + count)]

    def _score(self, groups: Sequence[RolloutGroup]) -> list[tuple[Score, ...]]:
        self.events.append("score")
        return [
            tuple(
                Score(reward=float(each.token_ids[-1]), is_formatted=True, failure=None)
                for each in group.rollouts
            )
            for group in groups
        ]

    @contextmanager
    def _time(self, phase: str) -> Iterator[None]:
        self.events.append(f"{phase} begins after {len(self.pool.requests)} requests")
        yield
        self.events.append(f"{phase} ends after {len(self.pool.requests)} requests")


def share(count: int, replica: int, num_replicas: int) -> tuple[int, int]:
    start = count * replica // num_replicas
    return start, count * (replica + 1) // num_replicas - start


def take(replica: int = 0, num_replicas: int = 1) -> tuple[TakenRollouts, Setting]:
    setting = Setting(replica, num_replicas)
    return setting.source.take(REQUEST), setting


def test_groups_come_with_their_own_scores() -> None:
    taken, _ = take()
    assert (taken.num_prompts, taken.num_rounds) == (5, 1)
    assert [each.group.prompt.index for each in taken.groups] == [10, 11, 12, 13, 14]
    for each in taken.groups:
        assert len(each.group.rollouts) == 2
        last_tokens = [rollout.token_ids[-1] for rollout in each.group.rollouts]
        assert [score.reward for score in each.scores] == last_tokens


def test_replicas_share_the_prompts_and_sample_the_same() -> None:
    whole, setting = take()
    assert [(each.key, each.seed) for each in setting.pool.requests] == [
        (index, sampling_seed(11, 3, index)) for index in range(10, 15)
    ]
    assert {each.num_samples for each in setting.pool.requests} == {2}
    assert all(each.sampling == SAMPLING for each in setting.pool.requests)
    parts = [take(replica, 3)[0] for replica in range(3)]
    assert [len(part.groups) for part in parts] == [1, 2, 2]
    assert {part.num_prompts for part in parts} == {5}
    assert tuple(group for part in parts for group in part.groups) == whole.groups


def test_each_step_samples_anew() -> None:
    setting = Setting()
    first = setting.source.take(REQUEST)
    later = setting.source.take(
        RolloutRequest(step=4, first_prompt=10, num_prompts=5, weight_version=2)
    )
    assert [each.group.prompt for each in first.groups] == [
        each.group.prompt for each in later.groups
    ]
    assert all(a.group != b.group for a, b in zip(first.groups, later.groups, strict=True))


def test_both_phases_are_timed() -> None:
    _, setting = take()
    assert setting.events == [
        "prompts",
        "rollout begins after 0 requests",
        "rollout ends after 5 requests",
        "reward begins after 5 requests",
        "score",
        "reward ends after 5 requests",
    ]


def test_other_weights_than_published_are_an_error_before_scoring() -> None:
    setting = Setting(version=1)
    expected = r"prompt 10: expected samples of weight version 2, got \[1\]; was the engine restart"
    with pytest.raises(EngineError, match=expected):
        setting.source.take(REQUEST)
    assert "score" not in setting.events


class Forgetful:
    """An environment that does not pass on that heads are needed."""

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Sampler
    ) -> tuple[Rollout, ...]:
        return await SingleTurn(str).rollouts(prompt, replace(request, num_logprobs=0), sampler)


@pytest.mark.parametrize("environment", [SingleTurn(str), TwoTurns()])
def test_heads_are_requested_where_the_objective_needs_them(environment: Environment) -> None:
    setting = Setting(num_logprobs=4, environment=environment)
    taken = setting.source.take(REQUEST)
    assert {each.num_logprobs for each in setting.pool.requests} == {4}
    for each in taken.groups:
        for rollout in each.group.rollouts:
            assert rollout.head.token_ids.shape == (rollout.num_response_tokens, 4)
    assert {each.num_logprobs for each in take()[1].pool.requests} == {0}


def test_an_environment_that_forgets_the_heads_is_named() -> None:
    setting = Setting(num_logprobs=4, environment=Forgetful())
    with pytest.raises(DataError, match=r"environment Forgetful, prompt 10: .* 4 log-.* got none"):
        setting.source.take(REQUEST)


def test_one_stray_token_is_found() -> None:
    pool = FakePool(weight_version=2)
    prompts = [make_prompt(4)]
    groups = sample_groups(pool, SingleTurn(str), prompts, SAMPLING, num_samples=2, seeds=[0])
    check_versions(groups, 2)  # -1, on the prompt, is no version
    check_versions([], 2)
    rollouts = groups[0].rollouts
    versions = (*rollouts[1].weight_versions[:-1], 9)
    stray = RolloutGroup(
        prompt=prompts[0], rollouts=(rollouts[0], replace(rollouts[1], weight_versions=versions))
    )
    with pytest.raises(EngineError, match=r"prompt 4: .* 2, got \[9\]"):
        check_versions([stray], 2)


def test_what_was_finished_when_engines_were_lost_is_not_sampled_again() -> None:
    setting = Setting()
    pool = setting.pool
    pool.failures[12] = EnginesLostError("none is left")
    with pytest.raises(EnginesLostError):
        setting.source.take(REQUEST)
    before = [request.key for request in pool.requests]
    pool.failures.clear()
    pool.requests.clear()
    groups = setting.source.take(REQUEST).groups
    assert [each.group.prompt.index for each in groups] == [10, 11, 12, 13, 14]
    again = [request.key for request in pool.requests]
    assert 12 in again and len(again) < 5 and len(before) + len(again) >= 6
    # Nothing of it is left for another request.
    pool.requests.clear()
    setting.source.take(REQUEST)
    assert len(pool.requests) == 5
    whole = Setting().source.take(REQUEST).groups
    assert [each.group for each in groups] == [each.group for each in whole]  # the same seeds
