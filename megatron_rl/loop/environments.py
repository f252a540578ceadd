"""The environment that `rollout.environment` names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from megatron_rl.config import Config
from megatron_rl.data.replies import ReplyFormat
from megatron_rl.rollout.environment import Environment
from megatron_rl.rollout.multi_turn import MultiTurn
from megatron_rl.rollout.single_turn import SingleTurn
from megatron_rl.rollout.tool_pool import ToolPool


def single_turn(tokenizer: Any) -> SingleTurn:
    """The environment of one response, decoded without special tokens."""

    def decode(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True)

    return SingleTurn(decode)


def make_environment(config: Config, tokenizer: Any, stack: ExitStack) -> Environment:
    """
    Args:
        tokenizer: a transformers tokenizer.
        stack: ends the tool's processes with the run.

    Raises:
        ConfigError: the chat template cannot show a tool's reply.
    """
    settings = config.rollout.environment
    if settings.name == "single_turn":
        return single_turn(tokenizer)

    def decode(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True)

    pool = stack.enter_context(ToolPool(settings))
    return MultiTurn(pool.reply, decode, ReplyFormat(tokenizer, config.data), settings)
