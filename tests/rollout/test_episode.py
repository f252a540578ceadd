"""Pieces in, a rollout out, whose ids, mask, log-probs and versions fit each other."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from megatron_rl.engine.requests import Completion
from megatron_rl.records import RolloutHead
from megatron_rl.rollout.episode import Episode


def completion(token_ids: tuple[int, ...], version: int = 3, engine: str = "http://a"):
    return Completion(
        token_ids=token_ids,
        logprobs=tuple(-0.125 * (index + 1) for index in range(len(token_ids))),
        weight_versions=(version,) * len(token_ids),
        finish_reason="stop",
        ends_with_stop_token=False,
        engine=engine,
    )


def test_two_turns_by_hand() -> None:
    episode = Episode()
    episode.say((1, 23))
    episode.sampled(completion((40, 41)))
    assert episode.token_ids == (1, 23, 40, 41)  # what the second turn is asked with
    episode.say((99,))
    episode.sampled(completion((7, 2), version=4, engine="http://b"))
    rollout = episode.rollout(finish_reason="length", text="7")
    assert tuple(rollout.token_ids) == (1, 23, 40, 41, 99, 7, 2)
    assert tuple(rollout.loss_mask) == (False, False, True, True, False, True, True)
    assert tuple(rollout.rollout_logprobs) == (0.0, 0.0, -0.125, -0.25, 0.0, -0.125, -0.25)
    assert tuple(rollout.weight_versions) == (-1, -1, 3, 3, -1, 4, 4)
    assert (rollout.finish_reason, rollout.text, rollout.engine) == ("length", "7", "http://b")
    assert rollout.num_response_tokens == 4 and rollout.is_truncated


def head_of(*rows: tuple[int, ...]) -> RolloutHead:
    token_ids = np.array(rows, dtype=np.int32)
    return RolloutHead(token_ids=token_ids, logprobs=-token_ids.astype(np.float32))


def test_heads_of_all_turns_follow_each_other() -> None:
    first = replace(completion((40, 41)), head=head_of((40, 9), (8, 7)))
    episode = Episode()
    episode.say((1, 23))
    assert episode.rollout(finish_reason="stop", text="").head is None
    episode.sampled(first)
    episode.say((99,))
    episode.sampled(replace(completion((7,)), head=head_of((7, 6))))
    rollout = episode.rollout(finish_reason="stop", text="")
    assert rollout.head == head_of((40, 9), (8, 7), (7, 6)) != head_of((40, 9), (8, 7), (7, 5))
    assert len(rollout.head.token_ids) == rollout.num_response_tokens
    with pytest.raises(ValueError, match="with none, got 2 turns with one before a turn without"):
        episode.sampled(completion((7,)))
    episode = Episode()
    episode.sampled(completion((7,)))
    with pytest.raises(ValueError, match=r"with none, got 0 turns with one before a turn with$"):
        episode.sampled(first)
    with pytest.raises(ValueError, match="expected one for each of its 2 tokens, got 1"):
        Episode().sampled(replace(first, head=head_of((7, 6))))


def test_random_episodes_stay_aligned() -> None:
    """Every token carries its own version and log-prob through, whatever the order of pieces."""
    for number in range(300):
        chance = random.Random(number)
        episode, expected, last_engine = Episode(), [], ""
        for _ in range(chance.randrange(8)):
            ids = tuple(chance.randrange(128) for _ in range(chance.randrange(6)))
            if chance.random() < 0.5:
                episode.say(ids)
                expected += [(each, False, 0.0, -1) for each in ids]
                continue
            logprobs = tuple(-chance.random() for _ in ids)
            versions = tuple(chance.randrange(5) for _ in ids)
            last_engine = f"http://{chance.randrange(3)}"
            episode.sampled(
                Completion(
                    token_ids=ids,
                    logprobs=logprobs,
                    weight_versions=versions,
                    finish_reason="stop",
                    ends_with_stop_token=False,
                    engine=last_engine,
                )
            )
            expected += list(zip(ids, [True] * len(ids), logprobs, versions))
        rollout = episode.rollout(finish_reason="stop", text="")
        columns = (
            rollout.token_ids,
            rollout.loss_mask,
            rollout.rollout_logprobs,
            rollout.weight_versions,
        )
        assert list(zip(*columns, strict=True)) == expected
        assert tuple(rollout.token_ids) == episode.token_ids
        assert rollout.engine == last_engine


@pytest.mark.parametrize("column", ["logprobs", "weight_versions"])
def test_a_completion_that_does_not_fit_itself_is_refused(column: str) -> None:
    whole = completion((7, 8, 2))
    episode = Episode()
    episode.say((1,))
    short = replace(whole, **{column: getattr(whole, column)[:2]})
    with pytest.raises(ValueError, match=f"completion.{column}: expected one for each of its 3"):
        episode.sampled(short)
    assert episode.token_ids == (1,)  # nothing of it was taken
