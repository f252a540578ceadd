"""Responses that are sampled by several requests."""

from __future__ import annotations

import asyncio

import pytest

from megatron_rl.config import SamplingConfig
from megatron_rl.engine.requests import Completion, GenerateRequest
from megatron_rl.rollout.pieces import PieceSampler
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
    return asyncio.run(PieceSampler(pool, bound).generate(asked))


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
