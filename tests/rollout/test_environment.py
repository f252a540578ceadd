"""Environments on a fake pool: one turn, and two turns with a tool's result between them."""

from __future__ import annotations

import random
from functools import partial

import pytest

from megatron_rl.config import SamplingConfig
from megatron_rl.engine.requests import Sampler
from megatron_rl.errors import EngineError
from megatron_rl.records import Prompt, Rollout
from megatron_rl.rollout.environment import Environment, EpisodeRequest
from megatron_rl.rollout.live import sample_groups
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.rollout.single_turn import SingleTurn
from tests.fakes.engine_pool import FakePool
from tests.fakes.environment import TwoTurns, tool_result
from tests.rollout.groups import make_prompt

SAMPLING = SamplingConfig(max_tokens=6)


def rollouts_of(
    pool: FakePool, environment: Environment, prompt: Prompt, request: EpisodeRequest
) -> tuple[Rollout, ...]:
    [rollouts] = pool.run([partial(environment.rollouts, prompt, request)])
    return rollouts


def test_a_single_turn_is_one_request() -> None:
    pool = FakePool(("http://a", "http://b"), weight_version=5)
    prompt = make_prompt(7)
    request = EpisodeRequest(num_samples=4, seed=1280, sampling=SAMPLING)
    rollouts = rollouts_of(pool, SingleTurn(str), prompt, request)
    [asked] = pool.requests
    assert (asked.token_ids, asked.num_samples, asked.seed) == (prompt.token_ids, 4, 1280)
    assert (asked.sampling, asked.key) == (SAMPLING, 7)
    [completions] = pool.run([partial(_generate_again, asked)])
    for rollout, completion in zip(rollouts, completions, strict=True):
        num_tokens = len(completion.token_ids)
        assert tuple(rollout.token_ids) == prompt.token_ids + completion.token_ids
        assert tuple(rollout.loss_mask) == (False,) * 3 + (True,) * num_tokens
        assert tuple(rollout.rollout_logprobs) == (0.0,) * 3 + completion.logprobs
        assert tuple(rollout.weight_versions) == (-1,) * 3 + (5,) * num_tokens
        assert rollout.finish_reason == completion.finish_reason
        is_stopped = completion.finish_reason == "stop"  # its last token only ends the text
        assert rollout.text == str(completion.token_ids[: -1 if is_stopped else None])
        assert rollout.engine == "http://b"
    assert len({tuple(rollout.token_ids) for rollout in rollouts}) == 4
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


async def _generate_again(request, sampler: Sampler):
    return await sampler.generate(request)


def test_two_turns_with_a_tool_stay_aligned() -> None:
    """Over random episodes: only sampled tokens are learnt from, and each is what it was."""
    for number in range(40):
        chance = random.Random(number)
        pool = FakePool(weight_version=number, end_probability=chance.random())
        prompt = make_prompt(number)
        request = EpisodeRequest(
            num_samples=chance.randrange(1, 5), seed=sampling_seed(0, 1, number), sampling=SAMPLING
        )
        rollouts = rollouts_of(pool, TwoTurns(), prompt, request)
        assert len(rollouts) == request.num_samples
        by_context = {each.token_ids: each for each in pool.requests}
        seeds = [each.seed for each in pool.requests]
        assert len(set(seeds)) == len(seeds) == 2 * request.num_samples
        for rollout in rollouts:
            length = len(rollout.token_ids)
            columns = (rollout.loss_mask, rollout.rollout_logprobs, rollout.weight_versions)
            assert [len(column) for column in columns] == [length] * 3
            for is_sampled, logprob, version in zip(*columns):
                assert (logprob < 0.0) == is_sampled
                assert version == (number if is_sampled else -1)
            # prompt | first turn | tool | second turn, by the mask alone
            turns = "".join("x" if kept else "." for kept in rollout.loss_mask)
            first = turns.index("x")
            tool = turns.index(".", first)
            second = turns.index("x", tool)
            token_ids = tuple(rollout.token_ids.tolist())
            assert token_ids[:first] == prompt.token_ids
            assert token_ids[tool:second] == tool_result(token_ids[first:tool])
            assert turns[second:] == "x" * (length - second)
            assert token_ids[:second] in by_context  # the second turn saw the tool's result
            assert rollout.engine == pool.urls[0]


def test_all_turns_of_a_prompt_reach_one_engine() -> None:
    pool = FakePool(("http://a", "http://b", "http://c"))
    prompts = [make_prompt(index) for index in range(4, 10)]
    groups = sample_groups(
        pool, TwoTurns(), prompts, SAMPLING, num_samples=3, seeds=[256 * n for n in range(6)]
    )
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        [engine] = {rollout.engine for rollout in group.rollouts}
        assert engine == pool.urls[group.prompt.index % 3]
    assert sorted(each.key for each in pool.requests) == [n for n in range(4, 10) for _ in range(6)]


def test_wrong_arguments_are_refused() -> None:
    pool, environment, prompts = FakePool(), SingleTurn(str), [make_prompt(0), make_prompt(1)]
    with pytest.raises(ValueError, match="seeds: expected one per prompt, 2, got 1"):
        sample_groups(pool, environment, prompts, SAMPLING, num_samples=2, seeds=[0])
    for count in (0, 257):
        with pytest.raises(ValueError, match=f"num_samples: expected 1 to 256, got {count}"):
            sample_groups(pool, environment, prompts, SAMPLING, num_samples=count, seeds=[0, 256])
    assert pool.requests == []


def test_an_environment_that_returns_too_few_is_refused() -> None:
    class OneMissing(SingleTurn):
        async def rollouts(self, prompt, request, sampler):
            return (await super().rollouts(prompt, request, sampler))[1:]

    with pytest.raises(ValueError, match="OneMissing: expected 3 rollouts of prompt 8, got 2"):
        sample_groups(
            FakePool(), OneMissing(str), [make_prompt(8)], SAMPLING, num_samples=3, seeds=[0]
        )


def test_an_engine_s_error_comes_through() -> None:
    pool = FakePool(failures={1: EngineError("engine http://a: exited with code 7")})
    with pytest.raises(EngineError, match="exited with code 7"):
        sample_groups(
            pool,
            TwoTurns(),
            [make_prompt(0), make_prompt(1)],
            SAMPLING,
            num_samples=2,
            seeds=[0, 9],
        )
