"""The policy losses, one module each: the module's name is the value of `objective.policy_loss`.

A module defines `surrogate(inputs: LossInputs) -> Surrogate`. It is found by its name and imported
on demand, so that a new loss needs only one new file here, and its test.
"""

from __future__ import annotations

import importlib

from megatron_rl.config.choices import module_names
from megatron_rl.errors import ConfigError
from megatron_rl.objective.inputs import PolicyLoss


def policy_losses() -> tuple[str, ...]:
    """The names of the losses in this folder, sorted."""
    return module_names(__path__)


def policy_loss_named(name: str) -> PolicyLoss:
    """The surrogate of that name.

    Raises:
        ConfigError: no module in this folder has the name, or the module defines no `surrogate`.
    """
    if name not in policy_losses():
        raise ConfigError(
            f"objective.policy_loss: expected one of {', '.join(policy_losses())}, got {name!r}"
        )
    module = importlib.import_module(f"{__name__}.{name}")
    if not hasattr(module, "surrogate"):
        raise ConfigError(
            f"objective.policy_loss={name}: expected a function surrogate(inputs) in "
            f"{module.__file__}, got none"
        )
    return module.surrogate
