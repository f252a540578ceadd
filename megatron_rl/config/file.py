"""Reads a checked `Config` from a YAML file and `key=value` overrides.

OmegaConf reads the YAML (so that `1e-6` is a number) and the overrides, merges them over the
defaults and resolves `${...}`. `config/schema.py` checks keys and types, because OmegaConf would
silently turn `"50"` into 50, `no` into the text "False" and 1 into True.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rl.config import Config
from megatron_rl.config.hub import model_folder
from megatron_rl.config.presets import PRESETS, dotted
from megatron_rl.config.rules import join_choices
from megatron_rl.config.schema import Keys, build, check, hint_at, one_line, show
from megatron_rl.errors import ConfigError

_OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.\w+|\[\d+\])*)=(.*)", re.DOTALL)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's settings. Models that are in the Hugging Face hub's local cache may be named.

    Args:
        path: YAML file; settings missing from it have the defaults of `megatron_rl.config`. Its key
            `base` names another file, relative to it, whose settings it changes.
        overrides: `key=value` texts that take precedence over the file, e.g. `loop.num_steps=50`,
            `data.tasks.0.weight=2`, `learner.optimizer.betas=[0.9,0.99]`. An empty value is "".

    Raises:
        ConfigError: in one line that names the file or the override, the key, the expected and the
            actual value, and, for an unknown key, the nearest valid one.
    """
    from_file = _read_with_base(Path(path))
    check(Config, from_file, (), str(path))
    changes = [(f"override {show(each)}", *_parse_override(each)) for each in overrides]
    preset = _preset(from_file, changes, str(path))
    tree = OmegaConf.merge(_as_tree(Config()), preset, from_file)
    for override, (origin, keys, value) in zip(overrides, changes, strict=True):
        hint = hint_at(keys, tree, origin)
        try:
            check(hint, value, keys, origin)
        except ConfigError as error:
            if str not in (hint, *get_args(hint)):
                raise
            raise ConfigError(f"{error}; quote a text: {_quoted(override)}") from None
        OmegaConf.update(tree, ".".join(keys), value, merge=True)
    _complete_sets(tree)
    origin = f"{path} with overrides" if overrides else str(path)
    try:
        resolved = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a key"
        raise ConfigError(f"{origin}: {key}: {one_line(error)}") from error
    check(Config, resolved, (), origin)
    return _with_cached_models(build(Config, resolved, (), origin))


def _with_cached_models(config: Config) -> Config:
    """The settings with folders of the hub's cache in place of names of models that are in it."""
    kl = replace(config.objective.kl, reference=model_folder(config.objective.kl.reference))
    return replace(
        config,
        model=replace(config.model, path=model_folder(config.model.path)),
        objective=replace(config.objective, kl=kl),
    )


def _complete_sets(tree: Any) -> None:
    """Gives every set of `eval.sets` the keys of `eval.sampling` that it does not set itself."""
    for each in tree.eval.sets if OmegaConf.is_list(tree.eval.sets) else ():
        each.sampling = OmegaConf.merge(tree.eval.sampling, each.get("sampling") or {})


def _preset(
    from_file: dict[str, Any], changes: Sequence[tuple[str, Keys, Any]], origin: str
) -> dict[str, Any]:
    """The settings of the preset that the last override of `objective.preset`, or the file, names.

    Raises:
        ConfigError: there is no preset of this name.
    """
    objective = from_file.get("objective")
    name = objective.get("preset", "") if isinstance(objective, dict) else ""
    for override, keys, value in changes:
        if keys == ("objective", "preset"):
            name, origin = value, override
        elif keys == ("objective",) and isinstance(value, dict) and "preset" in value:
            name, origin = value["preset"], override
    if name in ("", *PRESETS):
        return PRESETS.get(name, {})
    expected = join_choices(tuple(PRESETS))
    raise ConfigError(f"{origin}: objective.preset: expected {expected}, got {show(name)}")


def replaced_keys(config: Config) -> list[str]:
    """The settings of a run that differ from those of its preset, each as one line, for example
    "objective.clip_high: 0.24 replaces 0.0004 of objective.preset=gspo".
    """
    name = config.objective.preset
    settings = dotted(dataclasses.asdict(config))
    lines = []
    for key, value in dotted(PRESETS.get(name, {})).items():
        # The only interpolations of presets are whole values.
        expected = settings[value[2:-1]] if str(value).startswith("${") else value
        if settings[key] != expected:
            got, preset_value = show(settings[key]), show(expected)
            lines.append(f"{key}: {got} replaces {preset_value} of objective.preset={name}")
    return lines


def save_config(config: Config, path: str | Path) -> None:
    """Writes all settings of a run as YAML that `load_config` reads back to an equal `Config`."""
    path = Path(path)
    text = OmegaConf.to_yaml(OmegaConf.create(_as_tree(config)))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _read_with_base(path: Path) -> dict[str, Any]:
    """The settings of a file over those of its base, of which lists are replaced as a whole."""
    settings, files = _read_yaml(path), [path]
    while "base" in settings:
        base = settings.pop("base")
        if not isinstance(base, str) or not base:
            raise ConfigError(f"{files[-1]}: base: expected the path of a file, got {show(base)}")
        files.append(files[-1].parent / base)
        if files[-1].resolve() in [file.resolve() for file in files[:-1]]:
            raise ConfigError(f"{files[-2]}: base: expected another file, got {show(base)} again")
        below = _read_yaml(files[-1])
        check(
            Config,
            {key: value for key, value in below.items() if key != "base"},
            (),
            str(files[-1]),
        )
        merged = OmegaConf.merge(below, settings)
        settings = OmegaConf.to_container(merged, resolve=False)
    return settings


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable YAML file, got {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, got byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}: {where}: expected YAML, got {one_line(problem)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: expected YAML of a few levels, got too many levels") from error
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, got a list")
    return OmegaConf.to_container(loaded, resolve=False)


def _parse_override(override: str) -> tuple[Keys, Any]:
    origin = f"override {show(override)}"
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise ConfigError(
            f"{origin}: expected key=value, such as loop.num_steps=50{_bare(override)}"
        )
    key, text = match.groups()
    keys = tuple(re.split(r"\.|\[|\]\.?", key.rstrip("]")))
    if not text:
        return keys, ""
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(
            f"{origin}: expected a YAML value, got {one_line(problem)}; quote a text: "
            f"{_quoted(override)}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: expected a YAML value, got too many levels") from error
    return keys, OmegaConf.to_container(parsed, resolve=False)["value"]


def _quoted(override: str) -> str:
    """The override with its value as a text, as a shell takes it."""
    key, _, text = override.partition("=")
    return shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")


def _bare(override: str) -> str:
    """What to write in place of an override that begins with dashes."""
    bare = override.lstrip("-")
    return f"; write {bare}" if bare != override and _OVERRIDE.fullmatch(bare) else ""


def _as_tree(config: Config) -> Any:
    """The settings as mappings and lists that OmegaConf reads back to the same values."""
    return _escape(dataclasses.asdict(config))


def _escape(value: Any) -> Any:
    """Writes a literal "${" so that OmegaConf reads it back as text; tuples become lists."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escape(inner) for inner in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
