"""The kinds of rules that settings keep; an error names the key, what was expected, what came."""

from __future__ import annotations

from megatron_rl.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Of two choices or more."""
    names = f"{', '.join(choices[:-1])} or {choices[-1]}"
    require(value in choices, f"{key}: expected {names}, got {value!r}")


def at_least(bound: float, /, **values: float) -> None:
    """Every value, named by its key, from `bound` up; NaN is not."""
    for key, value in values.items():
        require(value >= bound, f"{key}: expected at least {bound:g}, got {value:g}")


def above_zero(**values: float) -> None:
    """Every value, named by its key, above 0; NaN is not."""
    for key, value in values.items():
        require(value > 0, f"{key}: expected above 0, got {value:g}")
