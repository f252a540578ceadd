"""[imports megatron] A copy of everything that an update changes on this rank, to take the update
back.

It holds the weights, the optimizer's main weights and moments, its step counts and the position in
the schedule, as the same bits. It is in host memory, so that the device needs no more memory: the
bytes of a rank's weights and optimizer state once more. Gradients, random state and lambda are not
part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_rl.learner.model.optimizer_parts import chained_optimizers
from megatron_rl.learner.model.training_model import TrainingModel


class RestorePoint:
    """The state of one rank's `TrainingModel` when it was last copied; empty at first."""

    def __init__(self, trained: TrainingModel) -> None:
        self._trained = trained
        self._tensors: list[torch.Tensor] = []  # on the host, in the order of `_tensors_of`
        self._groups: list[dict[str, Any]] = []
        self._schedule = 0

    def copy(self) -> None:
        """Replace the copy by the present state. A collective over all ranks."""
        self._trained.finish_weights()
        tensors = list(_tensors_of(self._trained))
        if not self._tensors:
            # Page-locked, so that a copy from a GPU takes its full bandwidth; kept for all steps.
            self._tensors = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                for tensor in tensors
            ]
        for saved, tensor in zip(self._tensors, tensors, strict=True):
            saved.copy_(tensor)
        self._groups = [_settings(group) for group in self._trained.optimizer.param_groups]
        self._schedule = self._trained.scheduler.num_steps

    def restore(self) -> None:
        """Bring back the state that was copied last.

        Raises:
            ValueError: nothing has been copied.
        """
        if not self._tensors:
            raise ValueError("RestorePoint.restore: expected a copy, nothing has been copied yet")
        for saved, tensor in zip(self._tensors, _tensors_of(self._trained), strict=True):
            tensor.copy_(saved)
        for saved, group in zip(self._groups, self._trained.optimizer.param_groups, strict=True):
            for key in _settings(group).keys() - saved.keys():
                del group[key]
            group.update(saved)
        self._trained.scheduler.num_steps = self._schedule


def _tensors_of(trained: TrainingModel) -> Iterator[torch.Tensor]:
    """Every tensor that an update changes, each once, in a fixed order."""
    own = [each.detach() for module in trained.modules for each in module.parameters()]
    own += [each for module in trained.modules for each in module.buffers()]
    storages = {each.untyped_storage().data_ptr() for each in own}
    yield from own
    for part in chained_optimizers(trained.optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                # A float32 model has no main weights of their own: they are the model's, or parts
                # of them.
                if parameter.untyped_storage().data_ptr() not in storages:
                    yield parameter.detach()
                state = part.optimizer.state[parameter]
                yield from (state[key] for key in sorted(state) if torch.is_tensor(state[key]))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of a parameter group without its parameters: step count, learning rate and so on."""
    return {
        key: value.clone() if torch.is_tensor(value) else value
        for key, value in group.items()
        if key != "params"
    }
