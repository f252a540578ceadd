"""[imports megatron] Moves what only an update needs out of a GPU's memory, while engines on the
same GPU generate, and back.

Gradients are freed; the optimizer's main weights and moments are copied to page-locked host memory
and their storage on the device is freed. The model's weights stay: log-probs can be computed
meanwhile. Tensors remain the same objects, so that views of them are valid again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_rl.learner.model.optimizer_parts import chained_optimizers
from megatron_rl.learner.model.training_model import TrainingModel


class OptimizerOffload:
    """The gradients and the optimizer's state of one rank, on the device at first."""

    def __init__(self, trained: TrainingModel) -> None:
        self._trained = trained
        self._storages: list[torch.UntypedStorage] = []
        self._saved: list[torch.Tensor] = []  # [bytes] uint8 each, on the host

    @property
    def is_offloaded(self) -> bool:
        """Whether the state is on the host."""
        return bool(self._storages)

    def offload(self) -> int:
        """Free gradients and the optimizer's state on the device; does nothing if they are.

        Returns:
            The number of bytes freed.
        """
        if self.is_offloaded:
            return 0
        num_bytes = 0
        storages = list(_optimizer_storages(self._trained))
        for number, storage in enumerate(storages):
            if number == len(self._saved):
                is_on_gpu = storage.device.type == "cuda"
                self._saved.append(
                    torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=is_on_gpu)
                )
            self._saved[number].copy_(_bytes_of(storage))
            num_bytes += storage.nbytes()
        for part in self._trained.parts:
            for buffer in (*part.buffers, *part.expert_parallel_buffers):
                num_bytes += buffer.grad_data.nbytes
            part.offload_grad_buffers(empty_cache=False)
        for storage in storages:
            storage.resize_(0)
        self._storages = storages
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return num_bytes

    def onload(self) -> None:
        """Bring the optimizer's state back as the same bits, and make room for gradients, which are
        0; does nothing if they are there.
        """
        for storage, saved in zip(self._storages, self._saved, strict=False):
            storage.resize_(saved.numel())
            _bytes_of(storage).copy_(saved)
        if self.is_offloaded:
            for part in self._trained.parts:
                part.restore_grad_buffers()
        self._storages = []


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """[n] uint8, a view of the whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _optimizer_storages(trained: TrainingModel) -> Iterator[torch.UntypedStorage]:
    """Every storage of the optimizer's state that is not the model's, each once, in fixed order."""
    model = (each for module in trained.modules for each in module.parameters())
    seen = {each.untyped_storage().data_ptr() for each in model}
    for part in chained_optimizers(trained.optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                tensors = [parameter, *(state[key] for key in sorted(state))]
                for tensor in filter(torch.is_tensor, tensors):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in seen and storage.nbytes():
                        seen.add(storage.data_ptr())
                        yield storage
