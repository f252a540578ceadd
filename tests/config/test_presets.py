"""Presets mean what they say: the table of docs/corrections.md lists them all with the keys they
set, and they hold in every file of configs/.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_rl.config import Config
from megatron_rl.config.file import load_config, replaced_keys, save_config
from megatron_rl.config.presets import COMMON, PRESETS, dotted
from tests.support.pages import CODE, section, settings_in, table

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def rows() -> dict[str, list[str]]:
    """The cells after the name, by preset."""
    return {row[0].strip("`"): row[1:] for row in table(section("corrections.md", "Presets"))}


def objective_settings_in(text: str) -> dict[str, Any]:
    """The settings that a text names; those of other sections begin with the section."""
    return {
        name if name.split(".")[0] in Config.__dataclass_fields__ else f"objective.{name}": value
        for name, value in settings_in(text).items()
    }


def test_the_table_lists_every_preset():
    assert list(rows()) == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_names_the_keys_that_a_preset_sets(name):
    paragraphs = section("corrections.md", "Presets").split("\n\n")
    [common] = [text for text in paragraphs if text.startswith("Every preset sets")]
    _, sets, _ = rows()[name]
    listed = objective_settings_in(common) | objective_settings_in(sets)
    assert settings_in(sets), f"{name}: expected at least one key that differs from the common ones"
    assert listed | {"objective.preset": name} == dotted(PRESETS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_the_tests_of_the_table_exist(name):
    tests = CODE.findall(rows()[name][2])
    assert tests
    for each in tests:
        path, _, function = each.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, each


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_holds_in_every_shipped_config(name, path):
    config = load_config(path, [f"objective.preset={name}"])
    settings = dotted(dataclasses.asdict(config))
    for key, value in dotted(PRESETS[name]).items():
        if key == "objective.normalize_length" and name == "dr_grpo":
            value = config.rollout.sampling.max_tokens
        assert settings[key] == value, key
    assert replaced_keys(config) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_name_a_preset_and_none_of_its_keys(path):
    written = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    of_presets = {key for preset in PRESETS.values() for key in dotted(preset)}
    expected = set() if "base" in written else {"objective.preset"}  # the base names it
    assert of_presets & set(dotted(written)) == expected


def test_presets_share_no_key_by_accident():
    """A preset's own entry replaces a section of COMMON whole, and so has to say all of it."""
    for name, preset in PRESETS.items():
        assert set(dotted({"objective": COMMON})) <= set(dotted(preset)), name


def test_a_run_names_the_keys_that_replace_those_of_its_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("objective: {preset: gspo, clip_low: 3e-4, clip_high: 0.24}")
    config = load_config(path, ["objective.normalize=token_mean", "objective.kl.estimator=k2"])
    expected = [
        "objective.clip_high: 0.24 replaces 0.0004 of objective.preset=gspo",
        "objective.normalize: 'token_mean' replaces 'sequence_mean' of objective.preset=gspo",
    ]
    assert replaced_keys(config) == expected
    save_config(config, tmp_path / "saved.yaml")
    assert replaced_keys(load_config(tmp_path / "saved.yaml")) == expected
    # Under another preset of the command line, the file's keys are the ones that are named.
    config = load_config(path, ["objective.preset=dapo", "loop.dynamic_sampling.enabled=false"])
    assert replaced_keys(config) == [
        "objective.clip_low: 0.0003 replaces 0.2 of objective.preset=dapo",
        "objective.clip_high: 0.24 replaces 0.28 of objective.preset=dapo",
        "loop.dynamic_sampling.enabled: false replaces true of objective.preset=dapo",
    ]
    config = load_config(path, ["objective.preset=dr_grpo", "objective.normalize_length=8"])
    assert replaced_keys(config)[-1] == (
        "objective.normalize_length: 8 replaces 256 of objective.preset=dr_grpo"
    )
    assert replaced_keys(load_config(path, ["objective.preset="])) == []


def test_the_saved_settings_of_a_run_replace_those_of_another_preset_and_are_named(tmp_path):
    """A run's config.yaml holds every key, so that a preset of the command line changes nothing."""
    path = tmp_path / "run.yaml"
    path.write_text("objective: {preset: dc_grpo}")
    save_config(load_config(path), tmp_path / "saved.yaml")
    lines = replaced_keys(load_config(tmp_path / "saved.yaml", ["objective.preset=gspo"]))
    assert lines == [
        "objective.policy_loss: 'ppo_clip' replaces 'gspo' of objective.preset=gspo",
        "objective.clip_low: 0.2 replaces 0.0003 of objective.preset=gspo",
        "objective.clip_high: 0.24 replaces 0.0004 of objective.preset=gspo",
        "objective.constraint.enabled: true replaces false of objective.preset=gspo",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.preset=gspo"],
        ["objective={preset: gspo}"],
        ["objective.preset=grpo", "objective={preset: gspo, kl: {estimator: k2}}"],
    ],
)
def test_a_preset_may_stand_in_an_override_of_the_section(overrides, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: runs/a\n")
    config = load_config(path, overrides)
    assert (config.objective.policy_loss, config.objective.clip_high) == ("gspo", 4e-4)
    assert replaced_keys(config) == []


def test_the_preset_of_a_file_takes_the_place_of_its_base_s(tmp_path):
    (tmp_path / "base.yaml").write_text("run_dir: runs/a\nobjective: {preset: dapo}\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nobjective: {preset: gspo}\n")
    (tmp_path / "key.yaml").write_text("base: base.yaml\nobjective: {clip_high: 0.5}\n")
    own = load_config(tmp_path / "own.yaml").objective
    assert (own.policy_loss, own.clip_low, own.clip_high) == ("gspo", 3e-4, 4e-4)
    key = load_config(tmp_path / "key.yaml", ["objective.preset=cispo"]).objective
    assert (key.policy_loss, key.clip_low, key.clip_high) == ("cispo", 1.0, 0.5)
