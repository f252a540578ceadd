"""Which verifier judges a source, and how verifiers are found by name."""

import pytest

from megatron_rl.config import EvalSetConfig, RewardTerm, TaskConfig
from megatron_rl.errors import ConfigError
from megatron_rl.records import Score
from megatron_rl.reward.registry import (
    check_verifier,
    load_verifier,
    resolve_verifiers,
    verifier_keys,
    verifiers_apart,
)


def judged(score: Score):
    assert score.failure is None
    return score.reward, score.is_formatted


def test_resolve_verifiers():
    tasks = [
        TaskConfig(name="chain_sum"),
        TaskConfig(path="/some/where/gsm8k.jsonl"),
        TaskConfig(name="dapo", path="a.parquet", verifier="numeric"),
        TaskConfig(name="mine", path="b.jsonl", verifier="pkg.mod:fn"),
    ]
    only = {
        "chain_sum": "reasoning_gym",
        "gsm8k": "math_verify",
        "dapo": "numeric",
        "mine": "pkg.mod:fn",
    }
    found = resolve_verifiers(tasks)
    assert found == {source: (RewardTerm(verifier=name),) for source, name in only.items()}
    assert verifiers_apart(found) == ()
    with pytest.raises(ConfigError, match="one verifier for chain_sum, got exact and reasoning_g"):
        resolve_verifiers(
            [TaskConfig(name="chain_sum"), TaskConfig(name="chain_sum", verifier="exact")]
        )
    with pytest.raises(ConfigError, match="scores its own tasks only"):
        resolve_verifiers([TaskConfig(path="a.jsonl", verifier="reasoning_gym")])


def test_several_verifiers_of_a_task():
    terms = [RewardTerm(), RewardTerm(verifier="pkg.mod:fn", weight=-0.5)]
    found = resolve_verifiers([TaskConfig(path="a.jsonl", rewards=terms), TaskConfig(name="maze")])
    assert [term.verifier for term in found["a"]] == ["math_verify", "pkg.mod:fn"]
    assert [term.weight for term in found["a"]] == [1.0, -0.5]
    assert verifiers_apart(found) == ("math_verify", "pkg.mod:fn")
    with pytest.raises(
        ConfigError, match=r"got exact and 1 x math_verify \+ -0\.5 x pkg.mod:fn: g"
    ):
        resolve_verifiers(
            [
                TaskConfig(path="a.jsonl", rewards=terms),
                TaskConfig(name="a", path="b.jsonl", verifier="exact"),
            ]
        )


def test_the_setting_that_names_a_verifier():
    several = [RewardTerm(verifier="exact"), RewardTerm(verifier="own:fn")]
    questions = {
        "data.tasks[0]": TaskConfig(path="a.jsonl", rewards=several),
        "eval.sets[3]": EvalSetConfig(name="b", path="b.jsonl", verifier="own:other"),
        "eval.sets[4]": EvalSetConfig(name="c", path="c.jsonl", verifier="own:fn"),
    }
    assert verifier_keys(questions) == {
        "exact": "data.tasks[0].rewards[0].verifier",
        "own:fn": "data.tasks[0].rewards[1].verifier",
        "own:other": "eval.sets[3].verifier",
    }


def test_check_verifier():
    check_verifier("math_verify")
    check_verifier("json:loads")
    with pytest.raises(ConfigError, match="nearest: numeric"):
        check_verifier("numerics")
    for name in ("no.such.module:fn", "no_such_module:fn", ":fn", "json:"):
        with pytest.raises(ConfigError, match="there is no module"):
            check_verifier(name)


def test_load_verifier(tmp_path, monkeypatch):
    (tmp_path / "own_verifiers.py").write_text(
        "from megatron_rl.records import Score\n"
        "def length(response, answer, metadata):\n    return len(response) / metadata['scale']\n"
        "def strict(response, answer, metadata):\n"
        "    return Score(reward=-1.0, is_formatted=False, failure=None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert judged(load_verifier("own_verifiers:length")("abc", "", {"scale": 2})) == (1.5, True)
    assert judged(load_verifier("own_verifiers:strict")("abc", "", {})) == (-1.0, False)
    with pytest.raises(ConfigError, match=r"function 'lenght' in own_verifiers.*nearest: length"):
        load_verifier("own_verifiers:lenght")
