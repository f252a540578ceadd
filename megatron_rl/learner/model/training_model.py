"""[imports megatron] A rank's parts of the model with their optimizer and schedule: the state that
a checkpoint holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.config.learner import OptimizerConfig
from megatron_rl.config.model import ModelConfig
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.build import build_model
from megatron_rl.learner.model.optimizer import build_optimizer
from megatron_rl.weights.geometry import Geometry

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingModel:
    """One rank's part of the model in training. Example: `build_training_model(ModelConfig(
    path="models/tiny"), OptimizerConfig(), geometry, parallel, num_updates=100)`.
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


def build_training_model(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    geometry: Geometry,
    parallel: Parallel,
    *,
    num_updates: int,
    has_routing_replay: bool = False,
) -> TrainingModel:
    """The model of `geometry`, loaded from `model.path`, with a new optimizer. A collective over
    all ranks.

    Args:
        num_updates: optimizer steps of the whole run, for a decaying learning rate.
        has_routing_replay: as in `build_model`.
    Raises:
        ConfigError: the model does not allow the layout or an option. DataError: the checkpoint
            does not match the geometry.
    """
    parts = build_model(model, geometry, parallel, optimizer, has_routing_replay=has_routing_replay)
    built, scheduler = build_optimizer(optimizer, parts, num_updates=num_updates)
    return TrainingModel(
        parallel=parallel, geometry=geometry, parts=parts, optimizer=built, scheduler=scheduler
    )
