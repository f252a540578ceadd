"""Which verifier judges which source, and how a verifier is found by its name.

A verifier is a function `(response, answer, metadata) -> Score`; the built-in ones have a file of
their own in this folder, a user's own is named "package.module:function".
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError
from megatron_rl.records import Score

Verifier = Callable[[str, str, dict[str, Any]], Score]

BUILT_IN = ("reasoning_gym", "exact", "numeric", "math_verify")


def resolve_verifiers(tasks: Sequence[TaskConfig]) -> dict[str, str]:
    """Source name -> verifier name; `auto` becomes the task's own scorer, for files math_verify.

    Raises:
        ConfigError: one source name with two verifiers, or the scorer of reasoning-gym for a file.
    """
    verifiers: dict[str, str] = {}
    for task in tasks:
        name = task.verifier
        if name == "auto":
            name = "math_verify" if task.path else "reasoning_gym"
        if name == "reasoning_gym" and task.path:
            raise ConfigError(
                f"data.tasks: {task.source}: expected a verifier for the file {task.path}, got "
                "reasoning_gym, which scores its own tasks only"
            )
        if verifiers.setdefault(task.source, name) != name:
            raise ConfigError(
                f"data.tasks: expected one verifier for {task.source}, got {name} and "
                f"{verifiers[task.source]}: give the two sources different names"
            )
    return verifiers


def check_verifier(name: str) -> None:
    """Refuses, without importing it, a verifier that cannot be there.

    Raises:
        ConfigError: an unknown name, or an import path whose module is not found.
    """
    module, colon, function = name.partition(":")
    if not colon:
        if name not in BUILT_IN:
            near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"data.tasks[].verifier: expected one of {', '.join(BUILT_IN)} or "
                f'"package.module:function", got {name!r} (nearest: {near})'
            )
        return
    try:
        found = importlib.util.find_spec(module) if module and function else None
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError(
            f'data.tasks[].verifier: expected "package.module:function", got {name!r}, '
            f"and there is no module {module!r} on the Python path"
        )


def load_verifier(name: str) -> Verifier:
    """Imports a verifier; slow for some, so only worker processes do it.

    Raises:
        ConfigError: the module has no such function.
        Any error that a user's module raises when it is imported.
    """
    if name in BUILT_IN:
        return importlib.import_module(f"megatron_rl.reward.{name}").verify
    module_name, _, function_name = name.partition(":")
    module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, dir(module), n=1, cutoff=0.0)
        raise ConfigError(
            f"data.tasks[].verifier: expected a function {function_name!r} in {module_name}, "
            f"got none (nearest: {near[0] if near else 'nothing'})"
        )

    def verify(response: str, answer: str, metadata: dict[str, Any]) -> Score:
        said = function(response, answer, metadata)
        if isinstance(said, Score):
            return said
        # A bare number cannot say whether an answer could be read: it was judged, so it was.
        return Score(reward=float(said), is_formatted=True, failure=None)

    return verify
