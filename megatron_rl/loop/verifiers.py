"""Which verifiers a run uses, and the settings that name them."""

from __future__ import annotations

from megatron_rl.config import Config, RewardTerm
from megatron_rl.reward.registry import (
    GROUP_VERIFIER_KEY,
    check_group_verifier,
    check_verifier,
    resolve_verifiers,
    verifier_keys,
)


def set_verifiers_of(config: Config) -> dict[str, tuple[RewardTerm, ...]]:
    """The verifiers of the named sets, by source.

    Raises:
        ConfigError: see `resolve_verifiers`.
    """
    return resolve_verifiers(tuple(config.eval.used_sets().values()), "eval.sets")


def verifier_keys_of(config: Config) -> dict[str, str]:
    """By the name of each verifier of the training data, of the named sets and of groups the
    setting that names it first.
    """
    tasks = {f"data.tasks[{number}]": task for number, task in enumerate(config.data.tasks)}
    sets = {f"eval.{key}": each for key, each in config.eval.used_sets().items()}
    keys = verifier_keys(tasks | sets)
    if config.reward.group_verifier:
        keys[config.reward.group_verifier] = GROUP_VERIFIER_KEY
    return keys


def check_verifiers(config: Config) -> None:
    """Raise ConfigError if a verifier or the group verifier cannot exist."""
    for name, key in verifier_keys_of(config).items():
        if key == GROUP_VERIFIER_KEY:
            check_group_verifier(name)
        elif name != "auto":
            check_verifier(name, key)
