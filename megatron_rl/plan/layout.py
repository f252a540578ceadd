"""The layout of a run on a cluster: the sizes of its parallel groups and what each rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config import Config
from megatron_rl.config.choices import ActivationRecomputation, DType
from megatron_rl.errors import ConfigError

ITEM_SIZES: dict[DType, int] = {"float32": 4, "bfloat16": 2}  # bytes of a number


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLayout:
    """The sizes of a learner's parallel groups, and the settings on which a rank's memory depends.

    Example of two nodes of 8 GPUs: `ClusterLayout(num_nodes=2, gpus_per_node=8, tensor=4,
    pipeline=2, data=2, dtype="bfloat16", has_distributed_optimizer=True)`.
    """

    num_nodes: int
    gpus_per_node: int
    tensor: int
    pipeline: int
    data: int  # replicas of the model
    dtype: DType
    has_distributed_optimizer: bool
    expert: int = 1  # ranks among which the experts are divided
    expert_tensor: int = 1  # ranks that hold a shard of each expert
    context: int = 1  # ranks among which the positions of a row are divided
    virtual_pipeline: int = 1  # parts of the model on each pipeline rank
    stage_layers: tuple[int, ...] = ()  # decoder layers of each part; (): the same in all
    is_sequence_parallel: bool = False
    recomputation: ActivationRecomputation = "none"

    @property
    def world_size(self) -> int:
        """The number of learner ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def num_optimizer_shards(self) -> int:
        """The number of ranks among which the optimizer's state is divided."""
        return self.data * self.context if self.has_distributed_optimizer else 1

    @property
    def num_expert_shards(self) -> int:
        """The number of ranks among which the optimizer's state of experts is divided: those that
        hold the same shards of the same experts.
        """
        copies = self.world_size // (self.pipeline * self.expert * self.expert_tensor)
        return copies if self.has_distributed_optimizer else 1

    def rows_in_flight(self, stage: int, num_rows: int) -> float:
        """For how many rows a pipeline rank keeps the activations of all its layers at once.

        1F1B (Narayanan et al. 2021, arXiv 2104.04473, section 2.2): stage p of P has forwarded
        P - p rows before its first backward pass. With V parts on each rank, it has forwarded
        2 (P - p - 1) + (V - 1) P + 1 rows through one part each, which is 1 / V of its layers.

        Args:
            stage: the pipeline rank.
            num_rows: rows of an optimizer update on one replica.
        """
        if self.virtual_pipeline == 1:
            return min(self.pipeline - stage, num_rows)
        behind = self.pipeline - stage - 1
        parts = 2 * behind + (self.virtual_pipeline - 1) * self.pipeline + 1
        return min(parts, num_rows * self.virtual_pipeline) / self.virtual_pipeline


def ranks_per_node(config: Config, *, num_nodes: int, gpus_per_node: int) -> int:
    """How many GPUs of each node have a learner rank: all, or with rollout.placement=share those
    that the engines of the fullest node leave.

    Raises:
        ConfigError: they leave none.
    """
    rollout = config.rollout
    if rollout.placement != "share" or config.replay:
        return gpus_per_node
    num_taken = -(-rollout.num_engines // num_nodes) * rollout.tensor_parallel
    if num_taken >= gpus_per_node:
        raise ConfigError(
            f"rollout.placement=share: expected engines that leave GPUs of each node to the "
            f"learner, got rollout.num_engines={rollout.num_engines} of rollout.tensor_parallel="
            f"{rollout.tensor_parallel} on {num_nodes} node(s) of {gpus_per_node} GPUs"
        )
    return gpus_per_node - num_taken


def layout_of(config: Config, *, num_nodes: int, gpus_per_node: int) -> ClusterLayout:
    """The layout of a run that has a learner rank on every GPU that `ranks_per_node` leaves it.

    Their number must be a multiple of the ranks of a replica
    (`learner.layout.parallel.check_world_size`).
    """
    parallel = config.parallel
    num_ranks = num_nodes * ranks_per_node(config, num_nodes=num_nodes, gpus_per_node=gpus_per_node)
    return ClusterLayout(
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        context=parallel.context,
        data=num_ranks // parallel.replica_size,
        dtype=config.model.dtype,
        has_distributed_optimizer=config.learner.optimizer.distributed,
        virtual_pipeline=parallel.virtual_pipeline,
        stage_layers=tuple(parallel.stage_layers),
        is_sequence_parallel=parallel.sequence_parallel,
        recomputation=config.model.activation_recomputation,
    )
