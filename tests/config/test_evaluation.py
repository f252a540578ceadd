"""Settings of evaluation sets: what they take over, and the rules they must keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import (
    Config,
    EvalConfig,
    EvalSetConfig,
    RewardTerm,
    RolloutConfig,
    SamplingConfig,
)
from megatron_rl.config.file import load_config, save_config
from megatron_rl.errors import ConfigError

TWO_SETS = """
eval:
  num_samples: 4
  sampling: {temperature: 0.6, top_p: 0.95, max_tokens: 100}
  sets:
    - {name: aime24, path: a.parquet, num_samples: 32, pass_at: [8, 1], verifier: numeric}
    - {name: hard, path: [b.jsonl], sampling: {max_tokens: 200}, rewards: [{verifier: exact}]}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TWO_SETS)
    return path


def test_a_set_takes_over_what_it_does_not_say(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    first, second = config.eval.sets
    assert first.sampling == SamplingConfig(temperature=0.6, top_p=0.95, max_tokens=100)
    assert second.sampling == SamplingConfig(temperature=0.6, top_p=0.95, max_tokens=200)
    used = config.eval.used_sets()
    assert list(used) == ["sets[0]", "sets[1]"]
    assert [(each.num_samples, each.pass_at) for each in used.values()] == [(32, [1, 8]), (4, [4])]
    assert [each.source for each in used.values()] == ["eval/aime24", "eval/hard"]
    assert second.terms == (RewardTerm(verifier="exact"),)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_overrides_of_sampling_reach_the_sets(path: Path) -> None:
    config = load_config(path, ["eval.sampling.temperature=0.1", "eval.sets.0.sampling.top_k=5"])
    first, second = config.eval.sets
    assert (first.sampling.temperature, second.sampling.temperature) == (0.1, 0.1)
    assert (first.sampling.top_k, second.sampling.top_k) == (5, 0)


def test_sets_are_left_out_by_name(path: Path) -> None:
    config = load_config(path, ["eval.skip=[aime24]"])
    assert list(config.eval.used_sets()) == ["sets[1]"]  # as messages about it say
    with pytest.raises(ConfigError, match=r"eval\.skip: expected aime24 or hard, got 'aime'"):
        load_config(path, ["eval.skip=[aime]"])
    assert load_config(path, ["eval.sets=[]"]).eval.sets == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "a/b", "path": "x"}, "name: expected letters, digits"),
        ({"path": "x"}, "name: expected letters, digits, .*, got ''"),
        ({"name": "chain_sum"}, "num_rows: expected the number of questions of the task chain_sum"),
        ({"name": "a", "task": "b", "path": "c"}, "task: expected a task or a path, got 'b' and"),
        ({"name": "a", "path": "x", "num_samples": 257}, "num_samples: expected at most 256"),
        ({"name": "a", "path": "x", "num_rows": -1}, "num_rows: expected at least 0"),
        ({"name": "a", "path": "x", "verifier": "no"}, "verifier: expected auto, exact"),
    ],
)
def test_rules_of_a_set(settings: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        EvalSetConfig(**settings)


def test_rules_between_sets() -> None:
    one = EvalSetConfig(name="one", path="x")
    with pytest.raises(ConfigError, match="sets: expected sets of different names, got one twice"):
        EvalConfig(sets=[one, replace(one, path="y")])
    with pytest.raises(ConfigError, match="of different names, got one twice"):
        EvalConfig(sets=[one, replace(one, name="ONE")])  # one folder, where case is ignored
    with pytest.raises(ConfigError, match="skip: expected none, since there are no sets, got 'x'"):
        EvalConfig(skip=["x"])
    for k in (0, 9):
        with pytest.raises(ConfigError, match=rf"sets\[0\]\.pass_at: expected 1 to .*=8, got {k}"):
            EvalConfig(sets=[replace(one, pass_at=[k])])
    EvalConfig(sets=[replace(one, pass_at=[9], num_samples=9)])


def test_the_engines_must_hold_every_set_that_is_used() -> None:
    long = EvalSetConfig(name="long", path="x", sampling=SamplingConfig(max_tokens=1000))
    many = EvalSetConfig(name="many", path="x", num_samples=64)
    evaluation = EvalConfig(sets=[long, many])
    with pytest.raises(ConfigError, match=r"eval\.sets\[0\]\.sampling\.max_tokens: expected below"):
        Config(eval=evaluation, rollout=RolloutConfig(max_model_len=1000))
    with pytest.raises(ConfigError, match=r"expected at least eval\.sets\[1\]\.num_samples=64"):
        Config(eval=evaluation, rollout=RolloutConfig(max_num_seqs=63))
    Config(
        eval=replace(evaluation, skip=["long", "many"]),
        rollout=RolloutConfig(max_model_len=1000, max_num_seqs=63),
    )
