"""Settings: every knob frozen, and every way to get one wrong answered in one line."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import (
    Config,
    ConstraintConfig,
    DataConfig,
    EvalConfig,
    LearnerConfig,
    LoopConfig,
    OptimizerConfig,
    RolloutConfig,
    SamplingConfig,
    TaskConfig,
)
from megatron_rl.config.file import _quoted, load_config, save_config
from megatron_rl.config.schema import list_knobs
from megatron_rl.errors import ConfigError

KNOBS = Path(__file__).with_name("knobs.txt")


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_list_of_knobs_is_frozen():
    """A new, renamed or changed default is a change of the interface: put it into knobs.txt too."""
    now = [f"{name} = {default!r}" for name, default in list_knobs().items()]
    assert now == KNOBS.read_text(encoding="utf-8").splitlines()


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == Config()


def test_values_keep_the_types_of_the_dataclasses(tmp_path):
    path = write(
        tmp_path,
        "learner: {optimizer: {learning_rate: 1e-6, betas: [0, 0.5]}}\n"
        "rollout: {kv_cache_gib: 2}\n"
        "reward: {truncated_reward: -1}\n"
        "data: {tasks: [{name: chain_sum, options: {min_terms: 2, deep: [1, {a: b}]}}]}\n",
    )
    config = load_config(path)
    assert config.learner.optimizer.learning_rate == 1e-6
    assert config.learner.optimizer.betas == (0.0, 0.5)
    assert isinstance(config.rollout.kv_cache_gib, float)
    assert isinstance(config.reward.truncated_reward, float)
    assert config.data.tasks == [
        TaskConfig(name="chain_sum", options={"min_terms": 2, "deep": [1, {"a": "b"}]})
    ]


def test_a_section_given_in_part_keeps_its_own_defaults(tmp_path):
    config = load_config(write(tmp_path, "eval: {sampling: {max_tokens: 8}}"))
    assert config.eval.sampling == SamplingConfig(temperature=0.7, max_tokens=8)


def test_overrides_win_and_reach_list_items(tmp_path):
    path = write(tmp_path, "data: {tasks: [{name: a}, {name: b}]}\nloop: {num_steps: 3}\nreplay: x")
    config = load_config(
        path,
        [
            "loop.num_steps=5",
            "data.tasks.0.weight=2",
            "data.tasks[1].options.max_terms=4",
            "learner.optimizer.betas.1=0.99",
            "objective.constraint.tolerance=5e-3",
            "replay=",
        ],
    )
    assert config.loop.num_steps == 5
    assert [task.weight for task in config.data.tasks] == [2.0, 1.0]
    assert config.data.tasks[1].options == {"max_terms": 4}
    assert config.learner.optimizer.betas == (0.9, 0.99)
    assert config.objective.constraint.tolerance == 0.005
    assert config.replay == ""


def test_saved_settings_load_to_an_equal_config(tmp_path):
    text = "data: {tasks: [{name: a, template: '{prompt} \\${x} = 1e-6', options: {z: null}}]}"
    config = load_config(write(tmp_path, text), ["model.path='007'", "loop.seed=9"])
    assert config.data.tasks[0].template == "{prompt} ${x} = 1e-6"
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loop: {num_step: 5}", "loop.num_step: expected a known key, got 'num_step'; the nearest"),
        ("lop: {num_steps: 5}", "the nearest valid one is loop"),
        ("prompts_per_step: 5", "the nearest valid one is loop.prompts_per_step"),
        (
            "data: {tasks: [{name: a, weihgt: 2}]}",
            "data.tasks[0].weihgt: expected a known key, got 'weihgt'; "
            "the nearest valid one is data.tasks[0].weight",
        ),
        ("loop: {num_steps: '5'}", "loop.num_steps: expected an integer, got '5'"),
        ("loop: {num_steps: 5.5}", "loop.num_steps: expected an integer, got 5.5"),
        ("loop: {num_steps: true}", "loop.num_steps: expected an integer, got true"),
        ("resume: no", "resume: expected a text, got false"),
        ("eval: {at_end: 1}", "eval.at_end: expected true or false, got 1"),
        ("loop:", "loop: expected a mapping, got null"),
        ("data: {tasks: {name: a}}", "data.tasks: expected a list, got {'name': 'a'}"),
        ("data: {tasks: [a]}", "data.tasks[0]: expected a mapping, got 'a'"),
        ("rollout: {urls: [1]}", "rollout.urls[0]: expected a text, got 1"),
        ("reward: {truncated_reward: a}", "expected a number or null, got 'a'"),
        ("learner: {optimizer: {betas: [1]}}", "betas: expected a list of 2 numbers, got [1]"),
        ("learner: {optimizer: {learning_rate: .nan}}", "expected a finite number, got nan"),
        *[
            (
                f"rollout: {{num_engines: 0, urls: ['{url}']}}",
                f"rollout.urls[0]: expected an address such as http://10.0.0.2:40001, got '{url}'",
            )
            for url in (
                "engine",
                "ftp://x",
                "http://",
                "http://[::1",
                "http://x:99999",
                "http://a b",
            )
        ],
        ("rollout: {kv_cache_gib: .inf}", "kv_cache_gib: expected a finite number, got inf"),
        ("rollout: {sampling: {temperature: -.inf}}", "temperature: expected a finite number"),
        (f"rollout: {{kv_cache_gib: {10**400}}}", "expected a finite number, got 1000"),
        ("learner: {optimizer: {betas: [0.9, .inf]}}", "betas[1]: expected a finite number"),
        (f"loop: {{num_steps: {2**63}}}", "num_steps: expected an integer below 2^63, got 92"),
        ("data: {num_held_out: 1000000000000}", "at most 1,000,000, got 1,000,000,000,000"),
        ("loop: {prompts_per_step: 2000000}", "at most 1,000,000, got 2,000,000"),
        (
            "eval: {sets: [{name: chain_sum, num_rows: 2000000}]}",
            "eval.sets[0].num_rows: expected at most 1,000,000",
        ),
        ("- a", "expected a mapping of settings at the top, got a list"),
        ("loop:\n  a: [b", "line 3, column 1: expected YAML, got"),
        (
            "loop: {seed: 1}\nloop: {seed: 2}",
            "line 2, column 1: expected YAML, got found duplicate",
        ),
        ("loop: {seed: '${loop.sed}'}", "loop.seed: Interpolation key 'loop.sed' not found"),
        ("loop: {seed: '${model.dtype}'}", "loop.seed: expected an integer, got 'float32'"),
        ("eval: {sampling: {top_p: 0}}", "eval.sampling.top_p: expected in (0, 1], got 0"),
        (
            "data: {tasks: [{name: a}, {name: b, weight: 0}]}",
            "data.tasks[1].weight: expected above",
        ),
    ],
)
def test_a_wrong_file_is_one_line_with_file_and_key(tmp_path, text, expected):
    path = write(tmp_path, text)
    message = complaint(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loop.num_steps", "expected key=value"),
        ("--loop.num_steps=3", "such as loop.num_steps=50; write loop.num_steps=3"),
        ("--loop", "expected key=value, such as loop.num_steps=50"),
        ("loop.num_step=3", "the nearest valid one is loop.num_steps"),
        ("loop.num_steps=x", "loop.num_steps: expected an integer, got 'x'"),
        ("loop.num_steps.deep=2", "expected no key below loop.num_steps, which is an integer"),
        ("loop.num_steps=[1", "expected a YAML value"),
        ("data.tasks.1.weight=2", "data.tasks: expected the index of one of its 1 items, got '1'"),
        ("data.tasks.0.weihgt=2", "the nearest valid one is data.tasks[0].weight"),
        ("data=null", "data: expected a mapping, got null"),
        (
            "data.tasks.0.template=Compute:",
            "expected a text, got {'Compute': None}; quote a text: "
            """'data.tasks.0.template="Compute:"'""",
        ),
        (
            "data.tasks.0.name=7",
            """expected a text, got 7; quote a text: 'data.tasks.0.name="7"'""",
        ),
        (
            "data.tasks.0.template={prompt} {level}=",
            """; quote a text: 'data.tasks.0.template="{prompt} {level}="'""",
        ),
    ],
)
def test_a_wrong_override_is_one_line_that_quotes_it(tmp_path, override, expected):
    message = complaint(write(tmp_path, "data: {tasks: [{name: a}]}"), override)
    assert message.startswith(f"override {override!r}: ")
    assert expected in message


@pytest.mark.parametrize("text", ["Compute: {prompt}", r"{prompt} \boxed{}", "it's {prompt}:\nnow"])
def test_the_suggested_quotes_are_read(tmp_path, text):
    path = write(tmp_path, "data: {tasks: [{name: a}]}")
    override = shlex.split(_quoted(f"data.tasks.0.template={text}"))
    assert load_config(path, override).data.tasks[0].template == text


def test_files_that_cannot_be_read(tmp_path):
    assert "nowhere.yaml: expected a readable YAML file" in complaint(tmp_path / "nowhere.yaml")
    assert "Is a directory" in complaint(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9")
    assert "expected UTF-8 text" in complaint(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (OptimizerConfig, "learning_rate", -1e-6),
        (OptimizerConfig, "betas", (0.9, 1.0)),
        (OptimizerConfig, "decay", "step"),
        (ConstraintConfig, "tolerance", -0.1),
        (ConstraintConfig, "initial", 11.0),
        (ConstraintConfig, "learning_rate", float("nan")),
        (SamplingConfig, "top_k", -1),
        (SamplingConfig, "min_p", 1.0),
        (SamplingConfig, "max_tokens", 0),
        (SamplingConfig, "stop", ["a", ""]),
        (SamplingConfig, "stop_token_ids", [5, -1]),
        (SamplingConfig, "min_tokens", 257),
        (SamplingConfig, "repetition_penalty", 0.0),
        (SamplingConfig, "presence_penalty", 2.5),
        (SamplingConfig, "frequency_penalty", float("nan")),
        (RolloutConfig, "num_engines", 0),
        (RolloutConfig, "port", 80),
        (RolloutConfig, "max_model_len", 256),
        (RolloutConfig, "top_k_ties", "some"),
        (RolloutConfig, "sampling", SamplingConfig(top_k=1)),
        (RolloutConfig, "sampling", SamplingConfig(min_tokens=1)),
        (RolloutConfig, "sampling", SamplingConfig(repetition_penalty=1.1)),
        (RolloutConfig, "sampling", SamplingConfig(presence_penalty=0.1)),
        (RolloutConfig, "sampling", SamplingConfig(frequency_penalty=-0.1)),
        (LearnerConfig, "recompute", "never"),
        (LearnerConfig, "mini_batches_per_step", 0),
        (LoopConfig, "samples_per_prompt", 1),
        (LoopConfig, "samples_per_prompt", 257),
        (EvalConfig, "num_samples", 257),
        (LoopConfig, "prompts_per_step", -64),
        (DataConfig, "held_out_seed", 0),
    ],
)
def test_rules_of_one_section(section, key, value):
    section()  # its defaults are fine
    with pytest.raises(ConfigError, match=key):
        section(**{key: value})


def test_rules_between_sections():
    config = Config()
    with pytest.raises(ConfigError, match="mini_batches_per_step: expected at most the 512"):
        replace(config, learner=LearnerConfig(mini_batches_per_step=513))
    with pytest.raises(ConfigError, match=r"tokens_per_micro_batch: .* 257 tokens"):
        replace(config, learner=LearnerConfig(tokens_per_micro_batch=256))
    slow_start = LearnerConfig(optimizer=OptimizerConfig(decay="cosine", warmup_steps=100))
    with pytest.raises(ConfigError, match="warmup_steps: expected below the 100 optimizer updates"):
        replace(config, learner=slow_start)
    replace(config, learner=replace(slow_start, mini_batches_per_step=2))  # 200 updates
    with pytest.raises(ConfigError, match=r"eval\.sampling\.max_tokens: expected below .*=300"):
        replace(
            config,
            rollout=RolloutConfig(max_model_len=300),
            eval=EvalConfig(sampling=SamplingConfig(max_tokens=300)),
        )
    for key in ("startup_timeout_seconds", "request_timeout_seconds"):
        with pytest.raises(ConfigError, match=rf"timeout_seconds: expected above rollout\.{key}"):
            replace(config, rollout=RolloutConfig(**{key: 1800.0}))
    replace(config, learner=LearnerConfig(optimizer=OptimizerConfig(learning_rate=0.0)))


def test_a_text_or_a_list_of_texts(tmp_path):
    path = write(tmp_path, "data: {tasks: [{name: a, path: [x.jsonl, y.jsonl]}, {path: z.jsonl}]}")
    first, second = load_config(path).data.tasks
    assert (first.path, second.path) == (["x.jsonl", "y.jsonl"], "z.jsonl")
    assert (first.source, second.source) == ("a", "z")
    changed = load_config(
        path,
        [
            "data.tasks.0.path.1=w.jsonl",
            "data.tasks.1.path=[v.csv]",
            "data.tasks.1.name=b",
            "warm_start.path=[s.jsonl]",
        ],
    )
    assert changed.data.tasks[0].path == ["x.jsonl", "w.jsonl"]
    assert changed.data.tasks[1].path == ["v.csv"] and changed.warm_start.path == ["s.jsonl"]
    save_config(changed, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == changed
    for override, expected in [
        ("data.tasks.0.path=7", "data.tasks[0].path: expected a text or a list, got 7"),
        ("data.tasks.0.path=[x, 7]", "data.tasks[0].path[1]: expected a text, got 7"),
        ("data.tasks.0.path.2=x", "data.tasks[0].path: expected the index of one of its 2 items"),
        (
            "data.tasks.1.path.0=x",
            "data.tasks[1].path[0]: expected no key below data.tasks[1].path",
        ),
        (
            "data.tasks.0.name=",
            "name: expected a label for the files of path=['x.jsonl', 'y.jsonl']",
        ),
    ]:
        assert expected in complaint(path, override)


def test_a_file_changes_the_settings_of_its_base(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "base.yaml").write_text(
        "objective: {preset: dapo}\nloop: {num_steps: 7, seed: 3}\n"
        "data: {tasks: [{name: chain_sum}, {name: b}]}\n"
    )
    (tmp_path / "middle.yaml").write_text("base: other/base.yaml\nloop: {num_steps: 8}\n")
    path = write(tmp_path, "base: middle.yaml\nloop: {num_steps: 9}\ndata: {tasks: [{name: a}]}\n")
    config = load_config(path, ["loop.seed=4"])
    assert (config.loop.num_steps, config.loop.seed) == (9, 4)
    assert config.objective.clip_high == 0.28  # of the preset in the base
    assert [task.name for task in config.data.tasks] == ["a"]  # lists are replaced


def test_a_base_that_is_wrong_is_named(tmp_path):
    assert complaint(write(tmp_path, "base: run.yaml\n")) == (
        f"{tmp_path}/run.yaml: base: expected another file, got 'run.yaml' again"
    )
    assert "base: expected the path of a file, got 3" in complaint(write(tmp_path, "base: 3\n"))
    path = write(tmp_path, "base: none.yaml\n")
    assert complaint(path).startswith(f"{tmp_path}/none.yaml: expected a readable YAML file")
    (tmp_path / "below.yaml").write_text("loop: {num_stpes: 1}\n")
    message = complaint(write(tmp_path, "base: below.yaml\n"))
    assert message.startswith(f"{tmp_path}/below.yaml: loop.num_stpes")
