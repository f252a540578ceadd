"""The kinds of rules that the settings follow.

Each function raises a ConfigError whose message names the key, the expected and the actual value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

from megatron_rl.errors import ConfigError

MAX_PROMPTS = 1_000_000  # of a step, held out, or of an evaluation set


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError unless a value is one of the choices."""
    require(value in choices, f"{key}: expected {join_choices(choices)}, got {value!r}")


def literal_choices(section: object) -> None:
    """Raises ConfigError unless every field of a section with a Literal type holds a member of it.

    The loader checks the same when it reads a file. This check also covers a section that is made
    in Python.

    Args:
        section: an instance of a settings dataclass.
    """
    for key, choices in _literal_fields(type(section)).items():
        one_of(key, getattr(section, key), choices)


def is_import_path(name: str) -> bool:
    """Whether a name has the form "package.module:function", which names a user's own function."""
    return ":" in name


def join_choices(choices: Sequence[str]) -> str:
    """The choices as an error message lists them: "a", "a or b", "a, b or c"."""
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def at_least(bound: float, /, **values: float) -> None:
    """Raises ConfigError unless every value, named by its key, is `bound` or more; NaN is not."""
    for key, value in values.items():
        require(value >= bound, f"{key}: expected at least {bound:g}, got {value:g}")


def at_most(bound: float, /, **values: float) -> None:
    """Raises ConfigError unless every value, named by its key, is `bound` or less; NaN is not."""
    for key, value in values.items():
        require(value <= bound, f"{key}: expected at most {bound:,.15g}, got {value:,.15g}")


def above_zero(**values: float) -> None:
    """Raises ConfigError unless every value, named by its key, is above 0; NaN is not."""
    for key, value in values.items():
        require(value > 0, f"{key}: expected above 0, got {value:g}")


@cache
def _literal_fields(section: type) -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(section)
    return {key: get_args(hint) for key, hint in hints.items() if get_origin(hint) is Literal}
