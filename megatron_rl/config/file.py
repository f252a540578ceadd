"""A YAML file and `key=value` overrides in, a checked `Config` out.

OmegaConf reads the YAML (so that `1e-6` is a number), the overrides and `${...}`, and lays them
over the defaults. Types and keys are checked here, against the dataclasses of `megatron_rl.config`:
OmegaConf itself would quietly turn `"50"` into 50, `no` into the text "False" and 1 into True.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rl.config import Config
from megatron_rl.config.presets import PRESETS
from megatron_rl.errors import ConfigError

_OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.\w+|\[\d+\])*)=(.*)", re.DOTALL)
_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's settings.

    Args:
        path: YAML file; what it leaves out keeps the default of `megatron_rl.config`.
        overrides: `key=value` texts that win over the file, e.g. `loop.num_steps=50`,
            `data.tasks.0.weight=2`, `learner.optimizer.betas=[0.9,0.99]`. An empty value is "".

    Raises:
        ConfigError: one line that names the file or the override, the key, what was expected, what
            came and, for an unknown key, the nearest valid one.
    """
    from_file = _read_yaml(Path(path))
    _check(Config, from_file, (), str(path))
    preset = _preset(from_file, overrides, str(path))
    tree = OmegaConf.merge(_as_tree(Config()), preset, from_file)
    for override in overrides:
        origin = f"override {_show(override)}"
        keys, value = _parse_override(override, origin)
        _check(_hint_at(keys, tree, origin), value, keys, origin)
        OmegaConf.update(tree, ".".join(keys), value, merge=True)
    origin = f"{path} with overrides" if overrides else str(path)
    try:
        resolved = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a key"
        raise ConfigError(f"{origin}: {key}: {_one_line(error)}") from error
    _check(Config, resolved, (), origin)
    return _build(Config, resolved, (), origin)


def _preset(from_file: dict[str, Any], overrides: Sequence[str], origin: str) -> dict[str, Any]:
    """The settings of `objective.preset`, from the last override of it or the file."""
    name = from_file.get("objective", {}).get("preset", "")
    for override in overrides:
        keys, value = _parse_override(override, f"override {_show(override)}")
        if keys == ("objective", "preset"):
            name, origin = value, f"override {_show(override)}"
    if not name:
        return {}
    if name not in PRESETS:
        raise ConfigError(
            f"{origin}: objective.preset: expected {', '.join(PRESETS)}, got {_show(name)}"
        )
    return PRESETS[name]


def save_config(config: Config, path: str | Path) -> None:
    """Writes all settings of a run as YAML that `load_config` reads back to an equal `Config`."""
    path = Path(path)
    text = OmegaConf.to_yaml(OmegaConf.create(_as_tree(config)))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def list_knobs() -> dict[str, Any]:
    """Dotted name and default of every setting; items of a list of sections are written `[]`."""
    return dict(_knobs_of(Config, Config(), ""))


def _knobs_of(section: type, defaults: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(section)
    for knob in dataclasses.fields(section):
        name, hint = prefix + knob.name, hints[knob.name]
        if defaults is not None:
            default = getattr(defaults, knob.name)
        elif knob.default_factory is not dataclasses.MISSING:
            default = knob.default_factory()
        else:
            default = knob.default
        if dataclasses.is_dataclass(hint):
            yield from _knobs_of(hint, default, name + ".")
            continue
        yield name, default
        if get_origin(hint) is list and dataclasses.is_dataclass(get_args(hint)[0]):
            yield from _knobs_of(get_args(hint)[0], None, name + "[].")


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
        raise ConfigError(f"{path}: {where}: expected YAML, got {_one_line(problem)}") from error
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, got a list")
    return OmegaConf.to_container(loaded, resolve=False)


def _parse_override(override: str, origin: str) -> tuple[tuple[str, ...], Any]:
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise ConfigError(f"{origin}: expected key=value, such as loop.num_steps=50")
    key, text = match.groups()
    keys = tuple(re.split(r"\.|\[|\]\.?", key.rstrip("]")))
    if not text:
        return keys, ""
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{origin}: expected a YAML value, got {_one_line(problem)}") from error
    return keys, OmegaConf.to_container(parsed, resolve=False)["value"]


def _hint_at(keys: tuple[str, ...], tree: Any, origin: str) -> Any:
    """The type that a dotted key must have; list items exist already, they are not made here."""
    hint: Any = Config
    for depth, key in enumerate(keys):
        above = keys[:depth]
        if dataclasses.is_dataclass(hint):
            _check_key(hint, key, above, origin)
            hint = get_type_hints(hint)[key]
        elif get_origin(hint) in (list, tuple):
            items = OmegaConf.select(tree, ".".join(above))
            if not key.isdigit() or int(key) >= len(items):
                raise ConfigError(
                    f"{origin}: {_dotted(above)}: expected the index of one of its "
                    f"{len(items)} items, got {key!r}"
                )
            hint = get_args(hint)[0]
        elif hint is dict or hint is Any:
            hint = Any
        else:
            raise ConfigError(
                f"{origin}: {_dotted(keys)}: expected no key below {_dotted(above)}, "
                f"which is {_describe(hint)}"
            )
    return hint


def _check(hint: Any, value: Any, keys: tuple[str, ...], origin: str) -> None:
    """Raises ConfigError where a value is not what the dataclasses say."""
    if isinstance(value, str) and "${" in value:
        return  # an interpolation has its type once it is resolved
    if not _is_of_type(hint, value):
        name = _dotted(keys) or "top level"
        raise ConfigError(f"{origin}: {name}: expected {_describe(hint)}, got {_show(value)}")
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        for key, inner in value.items():
            _check_key(hint, key, keys, origin)
            _check(hints[key], inner, (*keys, key), origin)
    elif get_origin(hint) in (list, tuple):
        for index, inner in enumerate(value):
            _check(get_args(hint)[0], inner, (*keys, str(index)), origin)


def _is_of_type(hint: Any, value: Any) -> bool:
    """Of the outermost type alone: items and keys below are checked one by one."""
    if get_origin(hint) is types.UnionType:
        return any(_is_of_type(option, value) for option in get_args(hint))
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if get_origin(hint) is list:
        return isinstance(value, list)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and len(value) == len(get_args(hint))
    if hint is Any:  # below the free options of a task
        return True
    if isinstance(value, bool):  # which Python counts as an integer
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and not math.isnan(value)
    return isinstance(value, hint)


def _check_key(section: type, key: Any, above: tuple[str, ...], origin: str) -> None:
    valid = [knob.name for knob in dataclasses.fields(section)]
    if key in valid:
        return
    close = difflib.get_close_matches(str(key), valid, n=1)
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(list_knobs())}
    elsewhere = difflib.get_close_matches(str(key), leaves, n=1, cutoff=0.8)
    if close or not elsewhere:
        nearest = close or difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)
        suggestion = _dotted((*above, nearest[0]))
    else:
        suggestion = leaves[elsewhere[0]]
    raise ConfigError(
        f"{origin}: {_dotted((*above, str(key)))}: expected a known key, got {str(key)!r}; "
        f"the nearest valid one is {suggestion}"
    )


def _build(hint: Any, value: Any, keys: tuple[str, ...], origin: str) -> Any:
    """Dataclasses from a checked tree; the rules between keys run here."""
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        given = {key: _build(hints[key], v, (*keys, key), origin) for key, v in value.items()}
        try:
            return hint(**given)
        except ConfigError as error:
            section = f"{_dotted(keys)}." if keys else ""
            raise ConfigError(f"{origin}: {section}{error}") from error
    if get_origin(hint) in (list, tuple):
        item = get_args(hint)[0]
        items = [_build(item, v, (*keys, str(i)), origin) for i, v in enumerate(value)]
        return get_origin(hint)(items)
    is_number = float in (hint, *get_args(hint)) and not isinstance(value, str)
    return float(value) if is_number and value is not None else value


def _as_tree(value: Any) -> Any:
    """Mappings and lists of a section, a literal "${" written so that it is read back as text."""
    if dataclasses.is_dataclass(value):
        return _as_tree(
            {knob.name: getattr(value, knob.name) for knob in dataclasses.fields(value)}
        )
    if isinstance(value, dict):
        return {key: _as_tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_tree(inner) for inner in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _dotted(keys: tuple[str, ...]) -> str:
    return "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in keys).removeprefix(".")


def _describe(hint: Any) -> str:
    if dataclasses.is_dataclass(hint) or hint is dict:
        return "a mapping"
    if get_origin(hint) is list:
        return "a list"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} numbers"
    if get_origin(hint) is types.UnionType:
        return " or ".join("null" if h is type(None) else _describe(h) for h in get_args(hint))
    return _SCALARS[hint]


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = _one_line(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(problem: object) -> str:
    """What it says, without OmegaConf's own lines on keys and types below it."""
    return " ".join(str(problem).partition("\n    full_key:")[0].split())
