"""Tools in processes of their own, of which some hang and some end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence

import pytest

from megatron_rl.config.rollout import EnvironmentConfig
from megatron_rl.errors import ConfigError
from megatron_rl.records import Prompt
from megatron_rl.rollout.multi_turn import ToolCrash, ToolTimeout
from megatron_rl.rollout.tool_pool import ToolPool
from tests.fakes.groups import make_prompt


def moody(prompt: Prompt, turns: Sequence[str]) -> str | None:
    """A user's tool; runs in the process of a tool."""
    match turns[-1]:
        case "hang":
            while True:
                pass
        case "die":
            os._exit(3)
        case "raise":
            raise ValueError("no such move")
        case "end":
            return None
        case said:
            print("a line that must not mix with the answers")
            return f"{prompt.index}: {said}, after {len(turns) - 1} turns"


def test_what_a_tool_does_costs_one_call() -> None:
    config = EnvironmentConfig(
        name="tests.rollout.test_tool_pool:moody", tool_seconds=1.0, num_workers=2
    )
    said = ["a", "hang", "b", "die", "raise", "end", "c"]

    async def ask_all(pool: ToolPool) -> list[object]:
        calls = [pool.reply(make_prompt(5), ["first", each]) for each in said]
        return await asyncio.gather(*calls, return_exceptions=True)

    with ToolPool(config) as pool:
        asyncio.run(ask_all(pool))  # the processes start
        begin = time.monotonic()
        answers = asyncio.run(ask_all(pool))
        assert time.monotonic() - begin < 20
    assert answers[0] == "5: a, after 1 turns" and answers[6] == "5: c, after 1 turns"
    assert isinstance(answers[1], ToolTimeout)
    assert isinstance(answers[3], ToolCrash) and "exited with code 3" in str(answers[3])
    assert isinstance(answers[4], ToolCrash) and str(answers[4]) == "ValueError: no such move"
    assert answers[5] is None


def test_a_tool_that_cannot_be_loaded_is_one_line() -> None:
    with (
        ToolPool(EnvironmentConfig(name="tests.rollout.test_tool_pool:absent")) as pool,
        pytest.raises(ConfigError, match=r"rollout.environment.name=tests.*absent: expected"),
    ):
        asyncio.run(pool.reply(make_prompt(0), ["x"]))
