"""Checks that rollouts hold the heads that score centering needs, joins the heads of the turns of
an episode, and removes those that are not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.errors import DataError
from megatron_rl.records import Rollout, RolloutGroup, RolloutHead, ScoredGroup


def check_heads(groups: Iterable[RolloutGroup], num_logprobs: int, where: str) -> None:
    """Check that every rollout with response tokens has a head of K tokens for each of them.

    Args:
        num_logprobs: K; 0: nothing is checked.
        where: the beginning of an error message.

    Raises:
        DataError: a rollout has no head, or one of another size.
    """
    if not num_logprobs:
        return
    for group in groups:
        for rollout in group.rollouts:
            num_tokens = rollout.num_response_tokens
            wanted = (num_tokens, num_logprobs) if num_tokens else None
            found = None if rollout.head is None else rollout.head.token_ids.shape
            if found != wanted:
                raise DataError(
                    f"{where}, prompt {group.prompt.index}: expected a head of {num_logprobs} "
                    "log-probs (objective.score_centering.num_logprobs) for each of "
                    f"{num_tokens} response tokens, got "
                    f"{'none' if found is None else f'{found[1]} for each of {found[0]}'}"
                )


def joined_heads(heads: Sequence[RolloutHead]) -> RolloutHead | None:
    """The heads of several pieces of one response, one after another; None if there are none."""
    if not heads:
        return None
    return RolloutHead(
        token_ids=np.concatenate([head.token_ids for head in heads]),
        logprobs=np.concatenate([head.logprobs for head in heads]),
    )


def without_heads(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """The same groups, with rollouts that have no heads."""
    return [
        replace(
            each,
            group=replace(each.group, rollouts=tuple(map(_without_head, each.group.rollouts))),
        )
        for each in groups
    ]


def _without_head(rollout: Rollout) -> Rollout:
    return rollout if rollout.head is None else replace(rollout, head=None)
