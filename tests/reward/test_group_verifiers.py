"""Verifiers of a whole group: the built-in ones by hand, and how the scorer applies one."""

from __future__ import annotations

import logging
import os

import pytest

from megatron_rl.config import RewardConfig, RewardTerm
from megatron_rl.errors import ConfigError
from megatron_rl.records import Prompt, Rollout, RolloutGroup, Score
from megatron_rl.reward.group_verifiers import length
from megatron_rl.reward.protocols import GroupInputs
from megatron_rl.reward.registry import check_group_verifier, load_group_verifier
from megatron_rl.reward.score import Scorer, rewards_of

OWN = """
import math, os, sys, time

def act(group):
    how = group.responses[0]
    if how == "hang":
        while True:
            pass
    if how == "exit":
        os._exit(0)
    if how == "raise":
        raise KeyError("a group verifier's own mistake")
    if how == "short":
        return [1.0]
    if how == "nan":
        return [math.nan] * len(group.responses)
    if how == "pid":
        return [float(os.getpid())] * len(group.responses)
    assert group.answer == "7" and group.metadata == {"level": 3}
    # Distinct answers get a bonus, and each number can be told from the others.
    return [
        100 * group.responses.count(text) + 10 * number + score.reward
        for text, number, score in zip(group.responses, group.num_tokens, group.scores)
    ]

def first_character(response, answer, metadata):
    if response == "crash":
        raise ValueError("no")
    return float(response[0] == "7")
"""
VERIFIERS = {"own": "scratch_group_verifiers:first_character"}
ACT = "scratch_group_verifiers:act"


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    (tmp_path / "scratch_group_verifiers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def make_group(*texts, cut=()):
    """A group whose response i has i + 1 tokens."""
    rollouts = tuple(
        Rollout(
            token_ids=(1,) * (number + 2),
            loss_mask=(False, *(True,) * (number + 1)),
            rollout_logprobs=(0.0,) * (number + 2),
            weight_versions=(-1, *(0,) * (number + 1)),
            finish_reason="length" if number in cut else "stop",
            text=text,
        )
        for number, text in enumerate(texts)
    )
    prompt = Prompt(
        index=5, source="own", text="", token_ids=(1,), answer="7", metadata={"level": 3}
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


def make_inputs(rewards, num_tokens, failures=None):
    failures = failures or [None] * len(rewards)
    return GroupInputs(
        answer="7",
        metadata={},
        responses=("",) * len(rewards),
        scores=tuple(
            Score(reward=reward, is_formatted=True, failure=failure)
            for reward, failure in zip(rewards, failures, strict=True)
        ),
        num_tokens=tuple(num_tokens),
    )


def test_length_worked_by_hand():
    """Lengths from 10 to 50: lambda = 0.5 - (length - 10) / 40."""
    group = make_inputs([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [10, 20, 50, 10, 30, 40])
    # lambda: 0.5, 0.25, -0.5 for the correct ones; 0.5 -> 0, 0.0 -> 0 and -0.25 for the others.
    assert length.group_rewards(group) == [0.5, 0.25, -0.5, 0.0, 0.0, -0.25]


def test_length_goes_by_what_evaluation_calls_correct():
    """A part of the reward, and a response whose verifier failed, are not correct."""
    group = make_inputs([0.9, 1.0, 1.0], [10, 10, 20], [None, "timeout", None])
    assert length.group_rewards(group) == [0.0, 0.0, -0.5]


def test_length_compares_the_responses_that_were_scored():
    """Scored lengths from 10 to 30; the failed responses of 2 and 90 tokens take no part."""
    failures = ["timeout", None, None, None, "crash"]
    group = make_inputs([0.0, 1.0, 1.0, 0.0, 0.0], [2, 10, 20, 30, 90], failures)
    assert length.group_rewards(group) == [0.0, 0.5, 0.0, -0.5, 0.0]
    alone = make_inputs([1.0, 0.0], [10, 20], [None, "timeout"])
    assert length.group_rewards(alone) == [0.0, 0.0]
    assert length.group_rewards(make_inputs([0.0], [10], ["crash"])) == [0.0]


def test_length_reads_the_rewards_of_several_verifiers():
    """The group verifier gets the scores as JSON; correct is what the first verifier says."""
    terms = (RewardTerm(verifier="exact"), RewardTerm(verifier="numeric"))
    config = RewardConfig(num_workers=1, group_verifier="length")
    with Scorer(config, {"own": terms}) as scorer:
        (scores,) = scorer.score([make_group("7.0", "7", "8")], with_group_verifier=True)
    assert [score.reward for score in scores] == [1.0, 2.0, 0.0]
    assert [score.is_correct for score in scores] == [False, True, False]
    # Of lengths 1, 2 and 3, only the second one is correct.
    assert [score.group_reward for score in scores] == [0.0, 0.0, -0.5]


def test_length_is_silent_where_all_lengths_are_equal():
    assert length.group_rewards(make_inputs([1.0, 0.0, 1.0], [8, 8, 8])) == [0.0, 0.0, 0.0]


def test_the_scorer_applies_it_only_where_asked_to():
    config = RewardConfig(num_workers=1, group_verifier="length")
    groups = [make_group("7", "7.", "8"), make_group("8", "7")]
    with Scorer(config, VERIFIERS) as scorer:
        plain = scorer.score(groups)
        judged = scorer.score(groups, with_group_verifier=True)
    assert [[score.group_reward for score in scores] for scores in plain] == [[0.0] * 3, [0.0] * 2]
    # Lengths 1, 2, 3, of which the last is wrong; and 1 (wrong), 2.
    assert [[score.group_reward for score in scores] for scores in judged] == [
        [0.5, 0.0, -0.5],
        [0.0, -0.5],
    ]
    for before, after in zip(plain, judged, strict=True):
        assert [score.reward for score in before] == [score.reward for score in after]
        assert [score.is_correct for score in before] == [score.is_correct for score in after]
    assert rewards_of(judged[0]) == (1.5, 1.0, -0.5)
    assert rewards_of(plain[0]) == (1.0, 1.0, 0.0)


def test_without_one_there_is_nothing_to_apply():
    with Scorer(RewardConfig(num_workers=1), VERIFIERS) as scorer:
        (scores,) = scorer.score([make_group("7", "8")], with_group_verifier=True)
    assert [score.group_reward for score in scores] == [0.0, 0.0]


def test_a_users_own_sees_the_prompt_and_all_responses():
    config = RewardConfig(num_workers=2, group_verifier=ACT, truncated_reward=-2.0)
    with Scorer(config, VERIFIERS) as scorer:
        (scores,) = scorer.score(
            [make_group("7", "8", "7", "crash", cut=(1,))], with_group_verifier=True
        )
    assert [score.reward for score in scores] == [1.0, -2.0, 1.0, 0.0]
    assert scores[3].failure == "crash"
    # 100 x occurrences + 10 x tokens + reward; nothing is added where a response was not scored.
    assert [score.group_reward for score in scores] == [211.0, 118.0, 231.0, 0.0]
    assert rewards_of(scores) == (212.0, 116.0, 232.0, None)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("hang", "timeout", "no answer within 0.5 s"),
        ("exit", "crash", "the scoring process exited with code 0"),
        ("raise", "crash", 'KeyError: "a group verifier\'s own mistake"'),
        ("short", "crash", "ValueError: expected 2 finite rewards, got [1.0]"),
        ("nan", "crash", "ValueError: expected 2 finite rewards, got [nan, nan]"),
    ],
)
def test_a_failure_is_named_and_counted_and_adds_nothing(how, kind, message, caplog):
    caplog.set_level(logging.WARNING)
    config = RewardConfig(num_workers=1, timeout_seconds=0.5, group_verifier=ACT)
    with Scorer(config, VERIFIERS) as scorer:
        groups = [make_group("7", "8"), make_group(how, "7"), make_group("7", "7")]
        first, failed, last = scorer.score(groups, with_group_verifier=True)
    assert [score.group_reward for score in first] == [111.0, 120.0]
    assert [score.group_reward for score in failed] == [0.0, 0.0]
    assert [score.group_reward for score in last] == [211.0, 221.0]
    assert [score.reward for score in failed] == [0.0, 1.0]
    assert all(score.failure is None for score in failed)
    assert f"1 of 3 groups could not be scored (1 {kind})" in caplog.text
    assert f"prompt 5 of own, verifier {ACT}: {message}" in caplog.text


def test_it_runs_in_a_scoring_process():
    config = RewardConfig(num_workers=1, group_verifier=ACT)
    with Scorer(config, VERIFIERS) as scorer:
        (scores,) = scorer.score([make_group("pid", "7")], with_group_verifier=True)
    assert scores[0].group_reward not in (0.0, float(os.getpid()))


def test_one_that_cannot_be_there_is_refused(tmp_path):
    check_group_verifier("length")
    check_group_verifier(ACT)
    expected = r"reward\.group_verifier: expected \"package.*there is no module 'nowhere'"
    with pytest.raises(ConfigError, match=expected):
        Scorer(RewardConfig(group_verifier="nowhere:act"), VERIFIERS)
    with pytest.raises(ConfigError, match=r"reward\.group_verifier: .* \(nearest: length\)"):
        check_group_verifier("lenght")
    (tmp_path / "broken_group_verifiers.py").write_text("import no_such_library\n")
    for name, message in [
        ("broken_group_verifiers:act", "No module named 'no_such_library'"),
        ("scratch_group_verifiers:akt", r"function 'akt' in scratch_group_.*nearest: act"),
    ]:
        with pytest.raises(ConfigError, match=rf"reward\.group_verifier: .*{message}"):
            load_group_verifier(name)
        with (
            Scorer(RewardConfig(num_workers=1, group_verifier=name), VERIFIERS) as scorer,
            pytest.raises(ConfigError, match=rf"^reward\.group_verifier: .*{message}"),
        ):
            scorer.score([make_group("7", "8")])
