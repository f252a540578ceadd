"""[imports megatron] A rank's parts of the model with their optimizer and schedule: the state that
a checkpoint holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.weights.geometry import Geometry

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingModel:
    """One rank's part of the model in training. Example: with `parts = build_model(...)`,
    `TrainingModel(parallel=parallel, geometry=geometry, parts=parts, optimizer=optimizer,
    scheduler=scheduler)`, the last two from `build_optimizer(OptimizerConfig(), parts,
    num_updates=100)`.
    """

    parallel: Parallel
    geometry: Geometry
    # this rank's parts of the model, in layer order; several only in a virtual pipeline. Each is in
    # Megatron's DDP; `.module` is the GPT
    parts: tuple[DistributedDataParallel, ...]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler  # of the learning rate

    @property
    def modules(self) -> list[GPTModel]:
        """The parts without Megatron's DDP."""
        return [part.module for part in self.parts]

    def finish_weights(self) -> None:
        """Wait for all weights of the last optimizer step, if they are gathered during the next
        forward pass; then a collective over the replicas, otherwise nothing.
        """
        for part in self.parts:
            if part.ddp_config.overlap_param_gather:
                part.start_param_sync(force_sync=True)
