"""Which text the verifiers see, and how the rewards of several verifiers become one score."""

import pytest

from megatron_rl.config import RewardConfig, RewardTerm
from megatron_rl.reward.registry import rewards_apart
from megatron_rl.reward.score import Scorer
from tests.reward.groups import make_group

VERIFIERS = """
import time

def size(response, answer, metadata):
    if response == "hang":
        time.sleep(60)
    if response == "raise":
        raise KeyError("a verifier's own mistake")
    return float(len(response))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "scratch_sizes.py").write_text(VERIFIERS)
    monkeypatch.syspath_prepend(tmp_path)
    return "scratch_sizes:size"


UNFINISHED = (
    # prompt, response, where the text ended
    ("q", r"<think>perhaps \boxed{7}? no wait", "length"),
    ("q", "<think>perhaps <answer>7</answer> no wait", "length"),
    ("q<think>\n", r"perhaps \boxed{7}? no wait", "length"),
    ("q", r"<think>a</think> \boxed{3} <think>or \boxed{7}", "length"),
    ("q", r"<think>perhaps \boxed{7}", "stop"),
    ("q<think>", "The answer is 7", "stop"),
    ("q", "<think>a</think><think>The answer is 7", "stop"),
    ("q <think>\n\n</think>\n\n<think>\n", "7", "length"),
)


def test_a_guess_in_unfinished_reasoning_earns_nothing():
    groups = [
        make_group([response], finish_reason=reason, source=verifier, text=text)
        for verifier in ("math_verify", "numeric", "exact")
        for text, response, reason in UNFINISHED
    ]
    ended = make_group([r"so</think> \boxed{7}"], source="exact", text="q<think>")
    verifiers = {name: name for name in ("math_verify", "numeric", "exact")}
    with Scorer(RewardConfig(), verifiers) as scorer:
        for (score,) in scorer.score(groups):
            assert (score.reward, score.failure) == (0.0, None)
        assert scorer.score([ended])[0][0].reward == 1.0
    config = RewardConfig(num_workers=1, skip_unfinished_reasoning=False)
    with Scorer(config, verifiers) as scorer:
        assert scorer.score(groups[:1])[0][0].reward == 1.0


def test_several_rewards_of_a_task(own):
    """Worked by hand: 1.0 x exact + 0.25 x length of the text."""
    terms = (RewardTerm(verifier="exact"), RewardTerm(verifier=own, weight=0.25))
    config = RewardConfig(num_workers=1, timeout_seconds=1.0)
    groups = [
        make_group(["7", "77", "", "hang", "raise"]),
        make_group(["7777"]),
        make_group(["7777"], source="scaled"),
    ]
    with Scorer(config, {"own": terms, "scaled": terms[1:]}) as scorer:
        scores, (other,), (scaled,) = scorer.score(groups)
    assert [score.reward for score in scores] == [1.25, 0.5, 0.0, 0.0, 0.0]
    assert [score.is_correct for score in scores] == [True, False, False, False, False]
    assert [score.is_formatted for score in scores] == [True, True, False, False, False]
    assert [score.failure for score in scores] == [None, None, None, "timeout", "crash"]
    assert scores[0].verifier_rewards == (("exact", 1.0), (own, 1.0))
    assert scores[3].verifier_rewards == ()
    # A reward of 1 from the others does not make a response correct, nor does a weight.
    assert (other.reward, other.is_correct) == (1.0, False)
    assert (scaled.reward, scaled.is_correct) == (1.0, True)
    assert rewards_apart(scores, ("exact", own)) == {"exact": [1.0, 0.0, 0.0], own: [1.0, 2.0, 0.0]}
