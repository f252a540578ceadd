"""Functions of the user's own that fail, and what is told of them."""

import pytest

from megatron_rl.config import RewardConfig
from megatron_rl.errors import ConfigError
from megatron_rl.reward.score import Scorer
from tests.reward.groups import make_group, make_prompt

BROKEN = """
def no_column(response, answer, metadata):
    return len(metadata["no_such_column"])

def too_few(response):
    return 1.0

def nothing(response, answer, metadata):
    pass

def text(response, answer, metadata):
    return "good"

def infinite(response, answer, metadata):
    return float("inf")

def lines(response, answer, metadata):
    raise ValueError("one\\ntwo")

def large(response, answer, metadata):
    return 7

def group(inputs):
    return [1.0]
"""


def test_a_function_of_the_users_own_that_fails_is_told_with_its_place(tmp_path, monkeypatch):
    """Its line, or where it begins if it could not be called or returned no number."""
    path = tmp_path / "broken_rewards.py"
    path.write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    expected = {
        "no_column": f"KeyError: 'no_such_column' ({path}:3)",
        "too_few": f"TypeError: too_few() takes 1 positional argument but 3 were given ({path}:5)",
        "nothing": f"TypeError: expected a number or a Score, got None ({path}:8)",
        "text": f"TypeError: expected a number or a Score, got 'good' ({path}:11)",
        "infinite": f"ValueError: expected a finite reward, got inf ({path}:14)",
        "lines": f"ValueError: one two ({path}:18)",
        "large": None,  # any finite number is a reward
    }
    names = {source: f"broken_rewards:{source}" for source in expected}
    config = RewardConfig(num_workers=1, group_verifier="broken_rewards:group")
    with Scorer(config, names) as scorer:
        for source, error in expected.items():
            assert scorer.crashes([make_prompt(source=source)], names[source]) == [error]
        [of_group] = scorer.crashes([make_prompt(source="large")], config.group_verifier)
    assert of_group == f"ValueError: expected 2 finite rewards, got [1.0] ({path}:23)"


def test_a_message_names_the_setting_of_a_verifier():
    keys = {"json:lods": "eval.sets[0].verifier", "exactly": "data.tasks[0].rewards[1].verifier"}
    with pytest.raises(ConfigError, match=r"^data\.tasks\[0\]\.rewards\[1\]\.verifier: expected"):
        Scorer(RewardConfig(), {"a": "exactly"}, keys)
    with (
        Scorer(RewardConfig(num_workers=1), {"own": "json:lods"}, keys) as scorer,
        pytest.raises(ConfigError, match=r"^eval\.sets\[0\]\.verifier: .*function 'lods'"),
    ):
        scorer.score([make_group(["a"])])
