"""The sets of choices: written once, or discovered from the modules of a folder."""

import subprocess
import sys

import pytest

from megatron_rl.config import (
    KLConfig,
    ModelConfig,
    QuantizationConfig,
    RewardConfig,
    SyncConfig,
    TaskConfig,
    WarmStartConfig,
)
from megatron_rl.config import choices as choices_module
from megatron_rl.config.choices import (
    GROUP_VERIFIERS,
    VERIFIERS,
    modules_in,
)
from megatron_rl.config.file import load_config
from megatron_rl.errors import ConfigError


def test_modules_are_found_without_importing_them(tmp_path, monkeypatch):
    folder = tmp_path / "losses"
    folder.mkdir()
    for name in ("__init__", "_private", "plain", "another", "transport"):
        (folder / f"{name}.py").write_text("raise AssertionError('imported')\n")
    (folder / "notes.md").write_text("")
    monkeypatch.setattr(choices_module, "_PACKAGE", tmp_path)
    assert modules_in("losses") == ("another", "plain", "transport")
    assert modules_in("losses", support={"transport"}) == ("another", "plain")
    with pytest.raises(FileNotFoundError, match=r"expected a folder of modules at .*nowhere"):
        modules_in("nowhere")


def test_the_verifiers_are_the_modules_of_their_folders():
    assert VERIFIERS == ("exact", "math_verify", "numeric", "reasoning_gym")
    assert GROUP_VERIFIERS == ("length",)


def test_settings_import_neither_torch_nor_a_verifier():
    script = (
        "import sys, megatron_rl.config, megatron_rl.config.file\n"
        "print([n for n in sys.modules if n in ('torch', 'math_verify', 'reasoning_gym')])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        (ModelConfig, "dtype", "dtype: expected float32 or bfloat16, got 'no'"),
        (WarmStartConfig, "decay", "decay: expected constant, linear or cosine, got 'no'"),
        (QuantizationConfig, "strategy", "strategy: expected channel, group or block, got 'no'"),
        (KLConfig, "estimator", "estimator: expected k1, k2 or k3, got 'no'"),
        (SyncConfig, "transport", "transport: expected collective.*, got 'no'"),
        (
            RewardConfig,
            "group_verifier",
            "group_verifier: expected length or \"package.module:function\", got 'no'",
        ),
    ],
)
def test_a_section_made_in_python_is_checked_too(section, key, expected):
    with pytest.raises(ConfigError, match=expected):
        section(**{key: "no"})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{name: maze, verifier: exact, rewards: [{}]}", "beside it, got verifier=exact"),
        ("{name: maze, rewards: [{}, {}]}", "every verifier once, got auto, auto"),
        ("{name: maze, rewards: [{weight: 0}]}", r"rewards\[0\].weight: expected above 0"),
        ("{name: maze, rewards: [{weight: .inf}]}", "expected a finite number, got inf"),
        ("{name: maze, rewards: [{verifier: exakt}]}", r"rewards\[0\].verifier: expected auto"),
    ],
)
def test_the_rewards_of_a_task(task, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{tasks: [{task}]}}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_verifier_is_a_module_or_an_import_path():
    for name in ("auto", *VERIFIERS, "package.module:function"):
        assert TaskConfig(name="chain_sum", verifier=name).verifier == name
    for name in ("", *GROUP_VERIFIERS, "package.module:function"):
        assert RewardConfig(group_verifier=name).group_verifier == name
    expected = (
        "verifier: expected auto, exact, math_verify, numeric, reasoning_gym or "
        "\"package.module:function\", got 'exakt'"
    )
    with pytest.raises(ConfigError, match=expected):
        TaskConfig(name="chain_sum", verifier="exakt")
