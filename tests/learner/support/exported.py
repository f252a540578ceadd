"""What a learner holds after a step, as Hugging Face tensors on rank 0."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.export import full_tensors


def exported_weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Copies by name on rank 0, nothing elsewhere; a collective."""
    return _exported(learner, torch.Tensor.detach)


def exported_gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """As `exported_weights`. Not for a distributed optimizer, where a rank holds the sum of its own
    piece alone.
    """
    return _exported(learner, lambda parameter: parameter.main_grad)


def _exported(
    learner: Learner, value: Callable[[torch.nn.Parameter], torch.Tensor]
) -> dict[str, torch.Tensor]:
    tensors = full_tensors(learner.trained.modules, learner.geometry, learner.parallel, value=value)
    return {name: tensor.clone() for name, tensor in tensors}
