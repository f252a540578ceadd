"""Checks a tree of settings against the dataclasses of `megatron_rl.config` and builds a Config.

The tree holds the values of YAML: mappings, lists, texts, numbers, booleans and null. Every error
is one line with the origin of the setting (`origin`), its key, the expected and the actual value.

pydantic is not used. In strict mode it builds dataclasses from mappings only if they are JSON,
which has no NaN and no keys other than texts. Converting its errors to such lines would also take
more code than checking the few types that settings have.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from megatron_rl.config import Config
from megatron_rl.config.rules import join_choices
from megatron_rl.errors import ConfigError

_DESCRIPTIONS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}

# The path to a setting, outermost key first: ("data", "tasks", "0", "name") is data.tasks[0].name.
Keys = tuple[str, ...]


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


def hint_at(keys: Keys, tree: Any, origin: str) -> Any:
    """The type of a setting that an override changes; `Any` within the free options of a task.

    Args:
        tree: OmegaConf's tree of the settings so far. It gives the lengths of lists: an override
            can change the items of a list but not add items.

    Raises:
        ConfigError: there is no such key, or no such item.
    """
    hint: Any = Config
    for depth, key in enumerate(keys):
        above = keys[:depth]
        if get_origin(hint) is types.UnionType:  # a text or a list
            is_list = OmegaConf.is_list(OmegaConf.select(tree, ".".join(above)))
            lists = [option for option in get_args(hint) if get_origin(option) is list]
            hint = lists[0] if is_list and lists else hint
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


def check(hint: Any, value: Any, keys: Keys, origin: str) -> None:
    """Checks the keys and types of a tree; texts with an interpolation are skipped.

    Args:
        hint: the expected type: a dataclass, or the type of a field of one.
        value: the tree.
        keys: the path of the tree in the settings.

    Raises:
        ConfigError: the dataclass does not have a key, or a value has the wrong type.
    """
    if isinstance(value, str) and "${" in value:
        return  # checked again when it is resolved
    if not _is_of_type(hint, value):
        name = _dotted(keys) or "top level"
        expected = _limit_of(hint, value) or _describe(hint)
        raise ConfigError(f"{origin}: {name}: expected {expected}, got {show(value)}")
    if get_origin(hint) is types.UnionType:
        hint = next(option for option in get_args(hint) if _is_of_type(option, value))
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        for key, inner in value.items():
            _check_key(hint, key, keys, origin)
            check(hints[key], inner, (*keys, key), origin)
    elif get_origin(hint) in (list, tuple):
        for index, inner in enumerate(value):
            check(get_args(hint)[0], inner, (*keys, str(index)), origin)


def _is_of_type(hint: Any, value: Any) -> bool:
    """Whether the outermost type is right; `check` calls it for every item and key below."""
    if get_origin(hint) is types.UnionType:
        return any(_is_of_type(option, value) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if get_origin(hint) is list:
        return isinstance(value, list)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and len(value) == len(get_args(hint))
    if hint is Any:  # within the options of a task, which have no types
        return True
    if isinstance(value, bool):  # an integer too, for Python
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and _is_finite(value)
    if hint is int:
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, hint)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _limit_of(hint: Any, value: Any) -> str:
    """What is expected in place of a number that is none or too large; "" for other values."""
    if isinstance(value, int) and hint is int and abs(value) >= 2**63:
        return "an integer below 2^63"
    is_number = isinstance(value, int | float) and float in (hint, *get_args(hint))
    return "a finite number" if is_number and not isinstance(value, bool) else ""


def _check_key(section: type, key: Any, above: Keys, origin: str) -> None:
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


def build(hint: Any, value: Any, keys: Keys, origin: str) -> Any:
    """Builds the dataclasses of a tree that `check` has accepted.

    Raises:
        ConfigError: a rule between keys is broken.
    """
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        given = {key: build(hints[key], v, (*keys, key), origin) for key, v in value.items()}
        try:
            return hint(**given)
        except ConfigError as error:
            section = f"{_dotted(keys)}." if keys else ""
            raise ConfigError(f"{origin}: {section}{error}") from error
    if get_origin(hint) in (list, tuple):
        item = get_args(hint)[0]
        items = [build(item, v, (*keys, str(i)), origin) for i, v in enumerate(value)]
        return get_origin(hint)(items)
    is_number = float in (hint, *get_args(hint)) and not isinstance(value, str)
    return float(value) if is_number and value is not None else value


def _dotted(keys: Keys) -> str:
    return "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in keys).removeprefix(".")


def _describe(hint: Any) -> str:
    if get_origin(hint) is types.UnionType:
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return join_choices(get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} numbers"
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return _DESCRIPTIONS[get_origin(hint) or hint]


def show(value: Any) -> str:
    """A value in the form used in messages: null and booleans as in YAML, at most 80 characters."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = one_line(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(problem: object) -> str:
    """A message as one line, without the lines on keys and types that OmegaConf adds."""
    return " ".join(str(problem).partition("\n    full_key:")[0].split())
