"""Episodes of several turns with a tool, on engines made up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_rl.config import SamplingConfig
from megatron_rl.config.rollout import EnvironmentConfig
from megatron_rl.records import Prompt, Rollout
from megatron_rl.rollout.environment import EpisodeRequest
from megatron_rl.rollout.live import sample_groups
from megatron_rl.rollout.multi_turn import MultiTurn, ToolCrash, ToolTimeout
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import PROMPT_IDS, make_prompt

BEFORE, AFTER, STOP = 120, 121, 2


def decode(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))


def reply_ids(text: str, *, after_stop_token: bool) -> tuple[int, ...]:
    ids = (BEFORE, *map(int, text.split()), AFTER)
    return ids if after_stop_token else (STOP, *ids)


async def echo(prompt: Prompt, turns: Sequence[str]) -> str | None:
    """The last two tokens of the turn; nothing after a turn of an odd number of them."""
    said = turns[-1].split()
    return None if len(said) % 2 else " ".join(said[-2:])


def play(
    tool=echo, *, pool: FakePool | None = None, max_tokens: int = 60, **settings: object
) -> list[Rollout]:
    environment = MultiTurn(
        tool, decode, reply_ids, EnvironmentConfig(name="calculator", **settings)
    )
    [group] = sample_groups(
        pool or FakePool(),
        environment,
        [make_prompt(0)],
        SamplingConfig(max_tokens=max_tokens),
        num_samples=4,
        seeds=[0],
    )
    return list(group.rollouts)


@pytest.mark.parametrize("seed", range(20))
def test_random_episodes_stay_aligned(seed: int) -> None:
    chance = random.Random(seed)
    pool = FakePool(weight_version=seed, end_probability=chance.uniform(0.05, 0.5))
    max_tokens = chance.randint(5, 80)
    rollouts = play(pool=pool, max_tokens=max_tokens, max_turns=chance.randint(1, 6))
    # What was sent to the engine is always the beginning of what is trained on.
    for request in pool.requests:
        assert any(
            tuple(each.token_ids[: len(request.token_ids)].tolist()) == request.token_ids
            for each in rollouts
        )
    assert len({request.seed for request in pool.requests}) == len(pool.requests)
    for rollout in rollouts:
        ids, mask = rollout.token_ids, rollout.loss_mask
        assert tuple(ids[: len(PROMPT_IDS)]) == PROMPT_IDS and not mask[: len(PROMPT_IDS)].any()
        assert len(ids) <= len(PROMPT_IDS) + max_tokens
        assert (rollout.weight_versions == np.where(mask, seed, -1)).all()
        assert ((rollout.rollout_logprobs < 0) <= mask).all()
        # Each masked piece is the whole reply to the policy's piece before it.
        edges = np.flatnonzero(np.diff(mask)) + 1
        pieces = [tuple(each.tolist()) for each in np.split(ids, edges)][1:]
        turns = [piece[:-1] if piece[-1] == STOP else piece for piece in pieces[::2]]
        assert rollout.text == decode(turns[-1])
        assert len(turns) == len(pieces[1::2]) + 1
        for turn, said, answer in zip(turns, pieces[::2], pieces[1::2], strict=False):
            text = asyncio.run(echo(make_prompt(0), [decode(turn)]))
            assert text is not None
            assert answer == reply_ids(text, after_stop_token=said[-1] == STOP)


def test_the_last_turn_is_not_answered() -> None:
    pool = FakePool(end_probability=0.3)
    asked = []

    async def always(prompt: Prompt, turns: Sequence[str]) -> str:
        asked.append(len(turns))
        return "7"

    rollouts = play(always, pool=pool, max_tokens=500, max_turns=3)
    assert sorted(asked) == [1] * 4 + [2] * 4
    assert {rollout.finish_reason for rollout in rollouts} == {"stop"}
    assert all((rollout.token_ids == BEFORE).sum() == 2 for rollout in rollouts)


def test_a_reply_without_room_cuts_the_episode() -> None:
    async def talkative(prompt: Prompt, turns: Sequence[str]) -> str:
        return "5 " * 100

    for rollout in play(talkative, max_tokens=40, pool=FakePool(end_probability=0.5)):
        assert rollout.finish_reason == "length"
        assert BEFORE not in rollout.token_ids


@pytest.mark.parametrize(("error", "reason"), [(ToolCrash, "crash"), (ToolTimeout, "timeout")])
def test_a_tool_that_fails_costs_its_episode(
    error: type[Exception], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    async def fails_once(prompt: Prompt, turns: Sequence[str]) -> str | None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error("division by zero")
        return None

    rollouts = play(fails_once, pool=FakePool(end_probability=0.5), max_tokens=500)
    assert sorted(each.finish_reason for each in rollouts) == sorted(["stop"] * 3 + [reason])
    assert "prompt 0, episode" in caplog.text and "division by zero" in caplog.text
    assert all(each.num_response_tokens > 0 for each in rollouts)


def test_an_episode_has_a_time_limit() -> None:
    async def hangs(prompt: Prompt, turns: Sequence[str]) -> str | None:
        await asyncio.sleep(60)
        return None

    pool = FakePool(end_probability=0.5)
    rollouts = play(hangs, pool=pool, max_tokens=500, episode_seconds=0.1)
    assert {each.finish_reason for each in rollouts} == {"timeout"}


def test_requests_ask_for_as_many_turns_as_there_are_seeds() -> None:
    request = EpisodeRequest(num_samples=4, seed=0, sampling=SamplingConfig())
    assert request.seed_of(3, 63) == 255
