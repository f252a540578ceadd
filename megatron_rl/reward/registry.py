"""Selects the verifier of each source, and finds and imports verifiers by name.

A name is that of a module in `reward/verifiers/` or `reward/group_verifiers/`, or an import path
"package.module:function" of a user's own function.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_rl.config.choices import GROUP_VERIFIERS, VERIFIERS
from megatron_rl.config.data import QuestionsConfig, RewardTerm
from megatron_rl.config.rules import is_import_path, join_choices
from megatron_rl.errors import ConfigError
from megatron_rl.records import Score
from megatron_rl.reward.protocols import GroupVerifier, Verifier

# The settings that name a verifier, for messages.
VERIFIER_KEY, GROUP_VERIFIER_KEY = "data.tasks[].verifier", "reward.group_verifier"


def resolve_verifiers(
    tasks: Sequence[QuestionsConfig], key: str = "data.tasks"
) -> dict[str, tuple[RewardTerm, ...]]:
    """The verifiers of each source, in the order of its settings: `auto` is the task's own scorer
    for a reasoning-gym task, and math_verify for a file.

    Args:
        key: the setting that lists the tasks, for messages.

    Raises:
        ConfigError: a source name has two verifiers, or a file has the scorer of reasoning-gym.
    """
    verifiers: dict[str, tuple[RewardTerm, ...]] = {}
    for task in tasks:
        terms = tuple(
            replace(term, verifier="math_verify" if task.path else "reasoning_gym")
            if term.verifier == "auto"
            else term
            for term in task.terms
        )
        if task.path and any(term.verifier == "reasoning_gym" for term in terms):
            raise ConfigError(
                f"{key}: {task.source}: expected a verifier for the file {task.path}, got "
                "reasoning_gym, which scores its own tasks only"
            )
        if verifiers.setdefault(task.source, terms) != terms:
            raise ConfigError(
                f"{key}: expected one verifier for {task.source}, got {_describe(terms)} and "
                f"{_describe(verifiers[task.source])}: give the two sources different names"
            )
    return verifiers


def verifiers_apart(verifiers: Mapping[str, Sequence[RewardTerm]]) -> tuple[str, ...]:
    """Names of the verifiers whose rewards are recorded apart: those of every source that has
    several.

    Args:
        verifiers: by source, as `resolve_verifiers` returns them.
    """
    several = [terms for terms in verifiers.values() if len(terms) > 1]
    return tuple(dict.fromkeys(term.verifier for terms in several for term in terms))


def rewards_apart(scores: Sequence[Score], names: Sequence[str]) -> dict[str, list[float]]:
    """The rewards that each verifier gave, without its weight, by the verifier's name.

    Args:
        names: of verifiers of tasks that have several.
    """
    return {
        name: [reward for score in scores for own, reward in score.verifier_rewards if own == name]
        for name in names
    }


def _describe(terms: Sequence[RewardTerm]) -> str:
    if len(terms) == 1 and terms[0].weight == 1:
        return terms[0].verifier
    return " + ".join(f"{term.weight:g} x {term.verifier}" for term in terms)


def verifier_keys(questions: Mapping[str, QuestionsConfig]) -> dict[str, str]:
    """By the name of each verifier the setting that names it first, for messages.

    Args:
        questions: tasks or sets by their settings: {"eval.sets[0]": EvalSetConfig(...)}.
    """
    keys: dict[str, str] = {}
    for place, each in questions.items():
        for number, term in enumerate(each.terms):
            of_term = f"{place}.rewards[{number}]" if each.rewards else place
            keys.setdefault(term.verifier, f"{of_term}.verifier")
    return keys


def is_built_in(name: str) -> bool:
    """Whether a verifier or group verifier is one of this package."""
    return not is_import_path(name)


def check_verifier(name: str, key: str = VERIFIER_KEY) -> None:
    """Refuses a verifier that cannot exist, without importing it.

    Args:
        key: the setting that names it, for messages.

    Raises:
        ConfigError: the name is unknown, or the module of an import path is not found.
    """
    _check(name, VERIFIERS, key)


def check_group_verifier(name: str) -> None:
    """Refuses a group verifier that cannot exist, without importing it.

    Raises:
        ConfigError: see `check_verifier`.
    """
    _check(name, GROUP_VERIFIERS, GROUP_VERIFIER_KEY)


def load_verifier(name: str, key: str = VERIFIER_KEY) -> Verifier:
    """Imports a verifier. Only worker processes do so, since some imports take seconds.

    Args:
        key: the setting that names it, for messages.

    Raises:
        ConfigError: the module cannot be imported, or has no such function.
    """
    function = _load(name, "verifiers", "verify", key)

    def verify(response: str, answer: str, metadata: dict[str, Any], /) -> Score:
        judged = function(response, answer, metadata)
        if isinstance(judged, Score):
            return judged
        # A number does not tell whether an answer could be read; since the response was judged, it
        # counts as formatted.
        try:
            reward = float(judged)
        except (TypeError, ValueError):
            raise TypeError(f"expected a number or a Score, got {judged!r}") from None
        return Score(reward=reward, is_formatted=True, failure=None)

    return verify


def load_group_verifier(name: str) -> GroupVerifier:
    """Imports a group verifier. Only worker processes do so.

    Raises:
        ConfigError: see `load_verifier`.
    """
    return _load(name, "group_verifiers", "group_rewards", GROUP_VERIFIER_KEY)


def _check(name: str, choices: tuple[str, ...], key: str) -> None:
    if is_built_in(name):
        if name not in choices:
            expected = join_choices((*choices, '"package.module:function"'))
            near = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key}: expected {expected}, got {name!r} (nearest: {near})")
        return
    module, _, function = name.partition(":")
    try:
        found = importlib.util.find_spec(module) if module and function else None
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError(
            f'{key}: expected "package.module:function", got {name!r}, and there is no module '
            f"{module!r} on the Python path"
        )


def _load(name: str, folder: str, function_name: str, key: str) -> Callable[..., Any]:
    """A function by its import path, or `function_name` of a module in a subfolder of reward/."""
    if is_built_in(name):
        module_name = f"megatron_rl.reward.{folder}.{name}"
    else:
        module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(
            f"{key}: expected a module that can be imported, got {name!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, dir(module), n=1, cutoff=0.0)
        raise ConfigError(
            f"{key}: expected a function {function_name!r} in {module_name}, got none "
            f"(nearest: {near[0] if near else 'nothing'})"
        )
    return function
