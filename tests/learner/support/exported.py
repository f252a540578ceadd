"""What a learner holds after a step, as Hugging Face tensors on rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.export import full_tensors


class _Gradients:
    """Main gradients in the place of the weights, for the same export."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._model.named_parameters():
            yield name, parameter.main_grad


def exported_weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Copies by name on rank 0, nothing elsewhere; a collective."""
    return _exported(learner.trained.model.module, learner)


def exported_gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """As `exported_weights`. Not for a distributed optimizer, where a rank holds the sum of its own
    piece alone.
    """
    return _exported(_Gradients(learner.trained.model.module), learner)


def _exported(model: Any, learner: Learner) -> dict[str, torch.Tensor]:
    tensors = full_tensors(model, learner.geometry, learner.parallel)
    return {name: tensor.clone() for name, tensor in tensors}
