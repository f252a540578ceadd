"""Responses that are sampled by several requests."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from megatron_rl.config import SamplingConfig
from megatron_rl.engine.requests import Completion, GenerateRequest
from megatron_rl.rollout.pieces import FIRST_TOKENS, MIN_TOKENS, Pace, PieceSampler
from tests.fakes.engine_pool import FakePool


def request(max_tokens: int, *, num_logprobs: int = 0) -> GenerateRequest:
    return GenerateRequest(
        token_ids=(1, 5),
        num_samples=3,
        seed=512,
        sampling=SamplingConfig(max_tokens=max_tokens),
        key=7,
        num_logprobs=num_logprobs,
    )


class Aging(FakePool):
    """Publishes new weights before every request."""

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        self.weight_version += 1
        return await super().generate(request)


def sample(pool: FakePool, bound: int, asked: GenerateRequest) -> tuple[Completion, ...]:
    return asyncio.run(PieceSampler(pool, Pace(bound)).generate(asked))


def test_a_short_response_is_one_request() -> None:
    pool = FakePool()
    assert sample(pool, 8, request(8)) == asyncio.run(FakePool().generate(request(8)))
    assert len(pool.requests) == 1


def test_pieces_go_on_from_the_tokens_before_and_keep_their_versions() -> None:
    pool = Aging(end_probability=0.0)
    completions = sample(pool, 4, request(10, num_logprobs=2))
    assert [each.sampling.max_tokens for each in pool.requests] == [4, 4, 4, 4, 2, 2, 2]
    assert len({each.seed for each in pool.requests}) == len(pool.requests)
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logprobs) == 10
        assert completion.head is not None and completion.head.token_ids.shape == (10, 2)
        assert completion.weight_versions[:4] == (1,) * 4
        assert sorted(set(completion.weight_versions)) == list(
            dict.fromkeys(completion.weight_versions)
        )
        followed = [each.token_ids for each in pool.requests]
        assert (1, 5, *completion.token_ids[:4]) in followed
        assert (1, 5, *completion.token_ids[:8]) in followed
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("bound", [1, 3])
def test_a_response_that_ends_is_not_continued(bound: int) -> None:
    for completion in sample(FakePool(end_probability=0.3), bound, request(40)):
        assert completion.finish_reason == "stop" and completion.ends_with_stop_token
        assert completion.token_ids.count(2) == 1 and completion.token_ids[-1] == 2


def test_a_bound_of_time_follows_the_engines_speed() -> None:
    pace = Pace(0, 2.0)
    assert pace.bound(1_000) == FIRST_TOKENS
    assert pace.bound(10) == 10
    pace.note(64, 1.0)  # 64 tokens a second
    assert pace.bound(1_000) == 128
    pace.note(64, 4.0)  # 0.8 x 64 + 0.2 x 16
    assert pace.bound(1_000) == int(2 * 54.4)
    for _ in range(100):
        pace.note(1, 10.0)
    assert pace.bound(1_000) == MIN_TOKENS
    both = Pace(100, 2.0)
    both.note(64, 1.0)
    assert both.bound(1_000) == 100


def test_pieces_of_a_bounded_time_are_one_response() -> None:
    """An engine of 10 tokens a second, by its own clock, and requests of about 2 seconds."""
    now = 0.0

    class Slow(FakePool):
        async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
            nonlocal now
            completions = await super().generate(request)
            now += max(len(each.token_ids) for each in completions) / 10
            return completions

    pool = Slow(end_probability=0.0)
    asked = replace(request(150), num_samples=1)
    [completion] = asyncio.run(PieceSampler(pool, Pace(0, 2.0), clock=lambda: now).generate(asked))
    assert [each.sampling.max_tokens for each in pool.requests] == [64, 20, 20, 20, 20, 6]
    assert len(completion.token_ids) == len(completion.logprobs) == 150
