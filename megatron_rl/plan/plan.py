"""The plan of a run on a cluster: everything that `tools/plan.py` prints.

What is wrong with the settings is found by the checks that a run makes before it starts anything.
Each is tried, so that all problems are told at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.engine.placement import may_share_gpus, sleeps
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.learner.layout.parallel import check_world_size
from megatron_rl.loop.preflight import (
    check_context,
    check_engine_place,
    check_gpus,
    check_reference,
    check_stop_tokens,
)
from megatron_rl.plan.activations import DeviceType
from megatron_rl.plan.layout import ClusterLayout, layout_of, ranks_per_node
from megatron_rl.plan.memory import (
    CONTEXT_BYTES,
    EngineMemory,
    LearnerMemory,
    engine_memory,
    learner_memory,
)
from megatron_rl.plan.parameters import num_parameters
from megatron_rl.plan.traffic import (
    CheckpointPlan,
    StepPlan,
    SyncPlan,
    checkpoint_plan,
    step_plan,
    sync_plan,
)
from megatron_rl.process.node import Node
from megatron_rl.weights.agreement import check_checkpoint
from megatron_rl.weights.geometry import Geometry, read_geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The GPUs that a run is planned for. Example: `Cluster(num_nodes=4, gpus_per_node=8,
    gpu_bytes=80e9, device="cuda")`.
    """

    num_nodes: int
    gpus_per_node: int
    gpu_bytes: float
    device: DeviceType


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The memory of the fullest GPU, in bytes. Example: `MemoryPlan(gpu_bytes=80e9, stage=0,
    learner=LearnerMemory(...), engine=EngineMemory(...), sleeps=False)`.
    """

    gpu_bytes: float
    stage: int  # the pipeline stage of this rank
    learner: LearnerMemory
    engine: EngineMemory | None  # of the engines on the same GPU; None: they have GPUs of their own
    sleeps: bool  # whether the engines and the learner take turns (rollout.placement=colocated)

    @property
    def training(self) -> float:
        """During an update. Engines keep their memory, or CUDA's context alone if they sleep."""
        if self.engine is None:
            return self.learner.total
        return self.learner.total + (CONTEXT_BYTES if self.sleeps else self.engine.total)

    @property
    def rollout(self) -> float:
        """While the engines sample. The learner keeps its weights; if they take turns, its
        gradients are freed meanwhile and the optimizer's state is in host memory.
        """
        learner = self.learner.resting if self.sleeps else self.learner.resident
        return learner + (self.engine.total if self.engine else 0.0)

    @property
    def fits(self) -> bool:
        """Whether both phases have room."""
        return max(self.training, self.rollout) <= self.gpu_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run on a cluster. Example: see tests/plan/test_plan.py."""

    geometry: Geometry
    num_parameters: int
    layout: ClusterLayout
    notes: tuple[str, ...]
    memory: MemoryPlan
    step: StepPlan
    sync: SyncPlan
    checkpoint: CheckpointPlan


def make_plan(config: Config, cluster: Cluster) -> Plan:
    """The plan of a run.

    Raises:
        ConfigError, DataError: the run could not start; one line for each problem.
    """
    geometry = read_geometry(config.model.path)
    sizes = {"num_nodes": cluster.num_nodes, "gpus_per_node": cluster.gpus_per_node}
    problems = problems_of(config, geometry, **sizes)
    if problems:
        raise ConfigError("\n".join(problems))
    layout = layout_of(config, **sizes)
    return Plan(
        geometry=geometry,
        num_parameters=num_parameters(geometry),
        layout=layout,
        notes=tuple(notes_of(config, gpus_per_node=cluster.gpus_per_node)),
        memory=memory_plan(config, geometry, layout, cluster),
        step=step_plan(config, geometry, layout),
        sync=sync_plan(config, geometry),
        checkpoint=checkpoint_plan(config, geometry, layout),
    )


def memory_plan(
    config: Config, geometry: Geometry, layout: ClusterLayout, cluster: Cluster
) -> MemoryPlan:
    """The memory of the fullest GPU: the pipeline stage that needs most, with the engines that the
    run starts on the same GPUs. Engines on GPUs of their own (`rollout.placement=share` or `nodes`,
    `rollout.urls`) have theirs.

    Raises:
        ConfigError: an engine has no room for one sequence.
    """
    kl = config.objective.kl.reference
    stage, learner = learner_memory(
        config,
        geometry,
        layout,
        device=cluster.device,
        reference=read_geometry(kl) if kl else None,
    )
    engine = None
    rollout = config.rollout
    if rollout.num_engines and may_share_gpus(rollout.placement) and not config.replay:
        # An engine has several GPUs; those that one host has no room for are on the others.
        num_gpus = rollout.num_engines * rollout.tensor_parallel
        room = cluster.gpus_per_node
        num_engines = -(-num_gpus // (room if num_gpus <= room else room * cluster.num_nodes))
        engine = engine_memory(
            config, geometry, gpu_bytes=cluster.gpu_bytes, num_engines=num_engines
        )
    return MemoryPlan(
        gpu_bytes=cluster.gpu_bytes,
        stage=stage,
        learner=learner,
        engine=engine,
        sleeps=engine is not None and sleeps(rollout.placement, cluster.device),
    )


def problems_of(
    config: Config, geometry: Geometry, *, num_nodes: int, gpus_per_node: int
) -> list[str]:
    """Why the run could not start on this cluster, one line each; empty if it could.

    The data, the tokenizer and the programs of the hosts are not looked at. The weights of a
    checkpoint are checked where they are there.
    """
    parallel = config.parallel
    try:
        num_ranks = ranks_per_node(config, num_nodes=num_nodes, gpus_per_node=gpus_per_node)
    except ConfigError as error:
        return [str(error)]
    world_size = num_nodes * num_ranks
    checks: list[Callable[[], object]] = [
        partial(geometry.check_layout, parallel),
        partial(check_world_size, parallel, world_size),
        partial(check_engine_place, config, world_size=world_size, local_world_size=num_ranks),
        partial(
            check_gpus,
            config,
            Node(index=0, count=num_nodes, num_ranks=num_ranks),
            gpus_per_node,
        ),
        partial(check_stop_tokens, config, geometry),
        partial(check_context, config, geometry),
        partial(check_reference, config, geometry),
    ]
    if has_weights(config.model.path):
        checks.append(partial(check_checkpoint, config.model.path, geometry))
    found = []
    for check in checks:
        try:
            check()
        except (ConfigError, DataError) as error:
            found.append(str(error))
    return found


def notes_of(config: Config, *, gpus_per_node: int) -> list[str]:
    """What is possible, but probably not meant."""
    notes = []
    if config.parallel.tensor > gpus_per_node:
        notes.append(
            f"parallel.tensor={config.parallel.tensor} is above the {gpus_per_node} GPUs of a "
            "node: every layer's all-reduce leaves the node"
        )
    if not has_weights(config.model.path):
        notes.append(f"model.path={config.model.path} has no *.safetensors: only its shape is used")
    return notes


def has_weights(folder: str) -> bool:
    """Whether a checkpoint folder holds tensors, and not only the shape of a model."""
    return any(Path(folder).glob("*.safetensors"))
