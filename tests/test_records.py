"""Groups hold one value for each rollout, and become samples in order."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from megatron_rl.records import (
    ROLLOUT_DTYPES,
    JudgedGroup,
    Prompt,
    Rollout,
    RolloutGroup,
    Sample,
    Score,
    ScoredGroup,
)
from tests.fakes.groups import make_rollout

ROLLOUTS = tuple(
    Rollout(
        token_ids=(1, token),
        loss_mask=(False, True),
        rollout_logprobs=(0.0, -0.5),
        weight_versions=(-1, 3),
        finish_reason="stop",
        text=str(token),
    )
    for token in (7, 8)
)
GROUP = RolloutGroup(
    prompt=Prompt(index=17, source="sum", text="4+3=", token_ids=(1,), answer="7"),
    rollouts=ROLLOUTS,
)
SCORES = (
    Score(reward=1.0, is_formatted=True, failure=None),
    Score(reward=0.25, is_formatted=True, failure=None, group_reward=0.25),
)
JUDGED = JudgedGroup(
    group=GROUP,
    scores=SCORES,
    overlong_penalties=(0.0, -0.5),
    advantages=(1.0, -1.0),
    is_kept=(True, False),
    has_signal=True,
)


def test_a_judged_group_becomes_samples() -> None:
    """The reward is the verifier's own; the penalty is in the advantage alone."""
    assert JUDGED.samples() == (
        Sample(prompt_index=17, sample_index=0, rollout=ROLLOUTS[0], reward=1.0, advantage=1.0),
        Sample(
            prompt_index=17,
            sample_index=1,
            rollout=ROLLOUTS[1],
            reward=0.25,
            advantage=-1.0,
            is_kept=False,
        ),
    )


def test_a_group_that_nothing_is_learnt_from() -> None:
    assert ScoredGroup(group=GROUP, scores=SCORES).without_judgement() == JudgedGroup(
        group=GROUP,
        scores=SCORES,
        overlong_penalties=(0.0, 0.0),
        advantages=(0.0, 0.0),
        is_kept=(True, True),
        has_signal=False,
    )


@pytest.mark.parametrize("column", ["scores", "overlong_penalties", "advantages", "is_kept"])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_columns_of_different_lengths_are_refused(column: str, length: int) -> None:
    values = (getattr(JUDGED, column) * 2)[:length]
    expected = f"{column}: expected one for each of the 2 rollouts of prompt 17, got {length}"
    with pytest.raises(ValueError, match=expected):
        replace(JUDGED, **{column: values})
    if column == "scores":
        with pytest.raises(ValueError, match=expected):
            ScoredGroup(group=GROUP, scores=values)


@pytest.mark.parametrize(
    ("reward", "is_correct"), [(1.0, True), (0.1 + 0.2 + 0.7, True), (0.999, False), (1.5, True)]
)
def test_a_full_reward_is_full_within_rounding(reward: float, is_correct: bool) -> None:
    score = Score(reward=reward, is_formatted=True, failure=None)
    assert score.is_correct == is_correct
    assert not replace(score, failure="timeout").is_correct
    assert Score(reward=sum([0.1] * 10), is_formatted=True, failure=None).is_correct  # 1 - 1.1e-16


def test_a_rollout_holds_arrays_and_equals_one_with_the_same_values() -> None:
    rollout = make_rollout(2)
    for name, dtype in ROLLOUT_DTYPES.items():
        assert getattr(rollout, name).dtype == dtype
    assert rollout.num_response_tokens == 2
    assert rollout == make_rollout(2) and hash(rollout) == hash(make_rollout(2))
    assert rollout != make_rollout(3)
    assert rollout != replace(rollout, rollout_logprobs=[0.0, 0.0, -0.5, -0.25])
    assert pickle.loads(pickle.dumps(rollout)) == rollout
