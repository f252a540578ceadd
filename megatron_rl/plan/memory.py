"""The memory of a GPU by component, of the learner rank that needs most and of an engine.

Weights, gradients and the optimizer's state follow Megatron's DDP and mixed-precision optimizers:
gradients are float32; bfloat16 weights have float32 main weights beside two moments; the
distributed optimizer divides main weights and moments over the data-parallel ranks; those of
experts over the ranks that hold the same experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.plan.activations import (
    DeviceType,
    backward_bytes,
    kept_by_head,
    kept_by_layer,
    loss_bytes,
)
from megatron_rl.plan.layout import ITEM_SIZES, ClusterLayout
from megatron_rl.plan.parameters import (
    stage_expert_parameters,
    stage_layers,
    stage_parameters,
)
from megatron_rl.plan.traffic import longest_sequence, step_plan, wire_bytes
from megatron_rl.weights.geometry import Geometry

GRADIENT_BYTES, MOMENT_BYTES, MAIN_WEIGHT_BYTES = 4, 8, 4  # of each parameter
# Estimates of what CUDA and NCCL take: a context with the kernels of its libraries, and for each
# communicator its channels' buffers (NCCL_BUFFSIZE of 4 MiB, sending and receiving, 24 channels).
CONTEXT_BYTES = 0.6e9
COMMUNICATOR_BYTES = 2 * 24 * 4 * 2**20
# Tokens that vLLM computes at once by default on a GPU of 80 GB (max_num_batched_tokens).
ENGINE_BATCH_TOKENS = 8192


class Components:
    """Named parts of a GPU's memory, each in bytes."""

    __slots__ = ()

    def components(self) -> Iterator[tuple[str, float]]:
        """The parts that are not empty, by name."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value:
                yield field.name.replace("_", " "), value

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(value for _, value in self.components())


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerMemory(Components):
    """The bytes of one learner rank in training.

    Example: `LearnerMemory(weights=4.1e9, gradients=8.2e9, optimizer=3.1e9, reference=0.0,
    activations=2.2e10, logits=1.6e9, backward=0.0, communication=1e9)`.
    """

    weights: float
    gradients: float
    optimizer: float
    reference: float  # the weights of objective.kl.reference
    activations: float
    logits: float
    # the working memory of a layer's backward pass, as far as it is more than the logits, which are
    # gone by then
    backward: float
    communication: float  # NCCL's buffers and CUDA's context; 0 on a CPU

    @property
    def resident(self) -> float:
        """What stays while the engines sample."""
        return self.total - self.activations - self.logits - self.backward

    @property
    def resting(self) -> float:
        """What stays while colocated engines sample (loop/rest.py)."""
        return self.resident - self.gradients - self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory(Components):
    """The bytes of the engines on one GPU. Example: `EngineMemory(weights=1.6e10, kv_cache=1.4e10,
    workspace=2e9)`.
    """

    weights: float
    kv_cache: float  # what is left of rollout.gpu_memory_utilization
    workspace: float  # activations and logits of one batch


def learner_memory(
    config: Config,
    geometry: Geometry,
    layout: ClusterLayout,
    *,
    device: DeviceType,
    reference: Geometry | None = None,
) -> tuple[int, LearnerMemory]:
    """The pipeline stage that needs most, and its memory.

    Args:
        reference: the shape of objective.kl.reference; None without one.
    """
    found = [
        _stage_memory(config, geometry, layout, stage, device, reference)
        for stage in range(layout.pipeline)
    ]
    worst = max(range(layout.pipeline), key=lambda stage: found[stage].total)
    return worst, found[worst]


def _stage_memory(
    config: Config,
    geometry: Geometry,
    layout: ClusterLayout,
    stage: int,
    device: DeviceType,
    reference: Geometry | None,
) -> LearnerMemory:
    size = ITEM_SIZES[layout.dtype]
    count = stage_parameters(geometry, layout, stage)
    num_expert = stage_expert_parameters(geometry, layout, stage)
    states = (count - num_expert) / layout.num_optimizer_shards
    states += num_expert / layout.num_expert_shards
    state = MOMENT_BYTES + (MAIN_WEIGHT_BYTES if layout.dtype != "float32" else 0)
    of_reference = stage_parameters(reference, layout, stage) * size if reference else 0.0
    activations, logits, backward = _row_memory(config, geometry, layout, stage, device)
    return LearnerMemory(
        weights=count * size,
        gradients=count * GRADIENT_BYTES,
        optimizer=states * state,
        reference=of_reference,
        activations=activations,
        logits=logits,
        backward=max(0.0, backward - logits),
        communication=_communication(layout) if device == "cuda" else 0.0,
    )


def _row_memory(
    config: Config, geometry: Geometry, layout: ClusterLayout, stage: int, device: DeviceType
) -> tuple[float, float, float]:
    """The bytes of kept activations, of logits and of a layer's backward pass."""
    positions = config.learner.tokens_per_micro_batch / layout.context
    num_layers = stage_layers(geometry, layout, stage)
    num_rows = step_plan(config, geometry, layout).rows_per_update
    per_layer = kept_by_layer(geometry, layout, device)
    in_flight = layout.rows_in_flight(stage, num_rows)
    backward = backward_bytes(geometry, layout, device)
    activations = num_layers * per_layer * in_flight
    logits = 0.0
    if stage == layout.pipeline - 1:
        activations += kept_by_head(geometry, layout, device)
        has_entropy_gradient = config.objective.entropy_coefficient > 0
        logits = loss_bytes(geometry, layout, has_entropy_gradient=has_entropy_gradient)
    return activations * positions, logits * positions, backward * positions


def _communication(layout: ClusterLayout) -> float:
    sizes = (layout.tensor, layout.pipeline, layout.context, layout.data, layout.world_size)
    sizes += (layout.expert, layout.expert_tensor)
    return CONTEXT_BYTES + COMMUNICATOR_BYTES * sum(size > 1 for size in sizes)


def engine_memory(
    config: Config, geometry: Geometry, *, gpu_bytes: float, num_engines: int
) -> EngineMemory:
    """The memory of `num_engines` engines that share one GPU of `gpu_bytes`. An engine divides
    weights, heads and columns among its `rollout.tensor_parallel` GPUs.

    Raises:
        ConfigError: rollout.gpu_memory_utilization leaves no room for the KV cache of one sequence.
    """
    rollout = config.rollout
    size, shards = ITEM_SIZES[rollout.dtype], rollout.tensor_parallel
    weights = wire_bytes(config, geometry) / shards
    wide = max(2 * geometry.ffn_hidden_size, 4 * geometry.hidden_size)
    if geometry.experts:  # each token has a copy and a product for every expert
        experts = geometry.experts
        wide = experts.num_chosen * (2 * experts.ffn_hidden_size + geometry.hidden_size)
    workspace = ENGINE_BATCH_TOKENS * wide * size
    workspace += rollout.max_num_seqs * geometry.vocab_size * 2 * 4  # logits and log-probs, float32
    workspace /= shards
    cache = rollout.gpu_memory_utilization * gpu_bytes - weights - workspace
    longest = longest_sequence(config, geometry) * kv_bytes_per_token(config, geometry)
    if cache < longest:
        needed = (weights + workspace + longest) / gpu_bytes
        raise ConfigError(
            f"rollout.gpu_memory_utilization: expected at least {needed:.2f}, for weights of "
            f"{weights / 1e9:.1f} GB and the KV cache of one sequence of {longest / 1e9:.1f} GB, "
            f"got {rollout.gpu_memory_utilization:g}; raise it, or lower rollout.max_model_len"
        )
    return EngineMemory(
        weights=num_engines * weights,
        kv_cache=num_engines * cache,
        workspace=num_engines * workspace,
    )


def kv_bytes_per_token(config: Config, geometry: Geometry) -> float:
    """The bytes of keys and values of one token in all layers, on one GPU of an engine. GPUs beyond
    the key-value heads hold copies.
    """
    size = (
        1 if config.rollout.kv_cache_dtype.startswith("fp8") else ITEM_SIZES[config.rollout.dtype]
    )
    shards = min(config.rollout.tensor_parallel, geometry.num_query_groups)
    num_heads = geometry.num_query_groups / shards
    return 2 * geometry.num_layers * num_heads * geometry.head_dim * size
