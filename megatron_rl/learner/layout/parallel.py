"""[imports megatron] Creates the process groups.

`initialize_parallel` takes the layout of the config and returns a `Parallel`: this rank's position
in the layout and the process groups, which are passed to the rest of the learner as arguments. The
backend is NCCL with a GPU and gloo without one.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rl.config.model import ParallelConfig
from megatron_rl.errors import ConfigError
from megatron_rl.learner.layout.context import replica_group
from megatron_rl.learner.layout.cpu_device import is_cpu_run, run_on_cpu
from megatron_rl.learner.layout.host_groups import HostGroups, host_groups
from megatron_rl.process.interface import use_route
from megatron_rl.process.loopback import is_one_host, rank_store, use_loopback


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """This rank's position in the layout, with its process groups. Example: rank 1 of 2 with TP=2:
    `tp_rank=1, pp_rank=0, dp_rank=0`.
    """

    layout: ParallelConfig
    rank: int
    world_size: int
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup  # one rank per replica; sequences are distributed among them
    cp_group: dist.ProcessGroup  # the ranks that share each row
    model_group: dist.ProcessGroup  # TP x CP x PP: the ranks of one replica
    ep_group: dist.ProcessGroup  # the ranks among which the experts are divided
    etp_group: dist.ProcessGroup  # the ranks that hold shards of the same experts
    edp_group: dist.ProcessGroup  # the ranks that hold the same shards of the same experts
    host: HostGroups  # for Python objects and counts

    @property
    def tp_rank(self) -> int:
        """This rank's index among the tensor-parallel ranks of its stage."""
        return self.tp_group.rank()

    @property
    def tp_size(self) -> int:
        """The number of tensor-parallel ranks of a stage."""
        return self.tp_group.size()

    @property
    def pp_rank(self) -> int:
        """The index of this rank's pipeline stage."""
        return self.pp_group.rank()

    @property
    def pp_size(self) -> int:
        """The number of pipeline stages."""
        return self.pp_group.size()

    @property
    def dp_rank(self) -> int:
        """The index of this rank's replica."""
        return self.dp_group.rank()

    @property
    def dp_size(self) -> int:
        """The number of replicas."""
        return self.dp_group.size()

    @property
    def is_row_head(self) -> bool:
        """Whether this is the first of the ranks that share a row."""
        return self.cp_group.rank() == 0

    @property
    def is_row_writer(self) -> bool:
        """Whether this is the one rank of its replica that writes down what the last stage computes
        for the rows.
        """
        return self.is_last_stage and self.is_row_head and self.tp_rank == 0

    @property
    def holds_exported_copy(self) -> bool:
        """Whether this is one of the TP x PP ranks whose copy of the model is exported."""
        return self.dp_rank == 0 and self.is_row_head

    @property
    def is_weight_source(self) -> bool:
        """Whether this rank sends its stage's weights, if every stage sends its own. The sources
        are then the ranks of its `host.pp`, in order.
        """
        return self.holds_exported_copy and self.tp_rank == 0

    @property
    def holds_exported_experts(self) -> bool:
        """Whether this is one of the EP x ETP x PP ranks whose copy of the experts is exported."""
        return self.edp_group.rank() == 0

    def expert_holder(self, ep_rank: int, etp_rank: int, pp_rank: int) -> int:
        """The global rank whose copy of these experts is exported. Megatron numbers the ranks of a
        pipeline stage by ETP, then EP, then copies (core/parallel_state.py).
        """
        per_stage = self.world_size // self.pp_size
        return pp_rank * per_stage + ep_rank * self.etp_group.size() + etp_rank

    def own_experts(self, num_experts: int) -> range:
        """The numbers of the experts that this rank holds, or holds shards of."""
        count = num_experts // self.ep_group.size()
        return range(self.ep_group.rank() * count, (self.ep_group.rank() + 1) * count)

    @property
    def is_first_stage(self) -> bool:
        """Whether this pipeline rank embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this pipeline rank computes the logits, and therefore log-probs and loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_replica_head(self) -> bool:
        """Whether this is the first rank of its replica, which sends requests to the engines."""
        return self.model_group.rank() == 0

    def from_replica_head(self, value: object) -> object:
        """Broadcast the head's value in the replica; the other ranks' arguments are ignored."""
        box = [value]
        source = dist.get_global_rank(self.host.model, 0)
        dist.broadcast_object_list(box, src=source, group=self.host.model)
        return box[0]

    def from_last_stage(self, value: object) -> object:
        """Broadcast the last pipeline stage's value to every stage; the other stages' arguments are
        ignored.
        """
        box = [value]
        source = dist.get_global_rank(self.host.pp, self.pp_size - 1)
        dist.broadcast_object_list(box, src=source, group=self.host.pp)
        return box[0]

    def from_first_rank(self, value: object) -> object:
        """Broadcast global rank 0's value to all ranks; the other ranks' arguments are ignored."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host.world)
        return box[0]

    def from_all_ranks(self, value: object) -> list:
        """The values of all ranks, in order, on every rank."""
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host.world)
        return values

    def any_rank(self, is_true: bool) -> bool:
        """Whether it is True on any rank. A collective over all ranks."""
        flag = torch.tensor([is_true], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.host.world)
        return bool(flag)

    def first_problem(self, problem: str) -> str:
        """The text of the first rank whose text is not empty; "" if there is none. The same on
        every rank; a collective over all ranks.
        """
        if not self.any_rank(bool(problem)):
            return ""
        return next(filter(None, self.from_all_ranks(problem)))

    def barrier(self) -> None:
        """Return once every rank has called it."""
        dist.barrier(group=self.host.world)

    def share(self, count: int) -> tuple[int, int]:
        """The index of the first item and the number of items of this replica, if all replicas
        share `count` items.
        """
        start = count * self.dp_rank // self.dp_size
        return start, count * (self.dp_rank + 1) // self.dp_size - start

    def reducer(self) -> Callable[[torch.Tensor, str], torch.Tensor]:
        """A function for values that one rank of each replica holds, such as those of its samples:
        `(float64 tensor, "sum" | "max")` to the tensor reduced over the replicas.
        """
        return _reducer(self.host.dp, torch.device("cpu"))

    def batch_reducer(self) -> Callable[[torch.Tensor, str], torch.Tensor]:
        """A function for sums over a replica's rows, which a rank of the last pipeline stage
        computes: `(float64 tensor, "sum" | "max")` to the tensor reduced over the global batch.
        The ranks that share a row hold the same sums, so they are added over the replicas alone.
        """
        return _reducer(self.dp_group, self.device)


def _reducer(
    group: dist.ProcessGroup, device: torch.device
) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """All-reduce of small tensors over a group whose backend works on `device`."""
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

    def reduce(values: torch.Tensor, operation: str) -> torch.Tensor:
        on_device = values.to(device, copy=True)
        dist.all_reduce(on_device, op=operations[operation], group=group)
        return on_device.to(values.device)

    return reduce


def check_world_size(config: ParallelConfig, world_size: int | None = None) -> int:
    """The number of ranks, if the layout allows it.

    Args:
        world_size: None means the ranks that torchrun started; 1 without torchrun.

    Raises:
        ConfigError: it is not a multiple of TP x CP x PP and of EP x ETP x PP.
    """
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model_size = config.replica_size
    if world_size % model_size:
        raise ConfigError(
            "parallel: expected a world size that is a multiple of tensor x context x pipeline = "
            f"{model_size}, got {world_size}; change parallel.tensor, parallel.context, "
            "parallel.pipeline or torchrun's --nproc_per_node (NPROC)"
        )
    expert_size = config.expert * config.expert_tensor * config.pipeline
    if world_size % expert_size:
        raise ConfigError(
            "parallel: expected a world size that is a multiple of expert x expert_tensor x "
            f"pipeline = {expert_size}, got {world_size}; change parallel.expert, "
            "parallel.expert_tensor, parallel.pipeline or torchrun's --nproc_per_node (NPROC)"
        )
    return world_size


def initialize_parallel(config: ParallelConfig, *, seed: int) -> Parallel:
    """Start torch.distributed and Megatron's groups from torchrun's environment.

    Raises:
        ConfigError: the world size is not a multiple of TP x CP x PP.
    """
    world_size, rank = check_world_size(config), int(os.environ.get("RANK", "0"))
    run_on_cpu()
    from megatron.core import parallel_state, tensor_parallel

    device = torch.device("cpu")
    if not is_cpu_run():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=config.timeout_seconds)
        if is_one_host():
            use_loopback(os.environ)
        else:
            use_route(os.environ)
        store = rank_store(timeout)
        dist.init_process_group(
            "gloo" if is_cpu_run() else "nccl",
            timeout=timeout,
            device_id=None if is_cpu_run() else device,
            **({} if store is None else {"store": store, "rank": rank, "world_size": world_size}),
        )
    if not parallel_state.model_parallel_is_initialized():
        create_groups(config, has_gloo_groups=True)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return current_parallel(config, device)


def create_groups(config: ParallelConfig, *, has_gloo_groups: bool) -> None:
    """Create Megatron's process groups; a collective over all ranks.

    Args:
        has_gloo_groups: whether Megatron creates gloo groups beside those of the backend.
    """
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        context_parallel_size=config.context,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=(
            config.virtual_pipeline if config.virtual_pipeline > 1 else None
        ),
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        create_gloo_process_groups=has_gloo_groups,
        distributed_timeout_minutes=max(1, round(config.timeout_seconds / 60)),
    )
    timeout = datetime.timedelta(seconds=config.timeout_seconds)
    for group in list(dist.distributed_c10d._world.pg_map):  # Megatron knows whole minutes only
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def current_parallel(config: ParallelConfig, device: torch.device) -> Parallel:
    """This rank's position in the groups that `create_groups` has created. A collective over all
    ranks.
    """
    from megatron.core import parallel_state

    timeout = datetime.timedelta(seconds=config.timeout_seconds)
    cp_group = parallel_state.get_context_parallel_group()
    model_group = replica_group(cp_group, timeout)
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    dp_group = parallel_state.get_data_parallel_group()
    return Parallel(
        layout=config,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=pp_group,
        dp_group=dp_group,
        cp_group=cp_group,
        model_group=model_group,
        ep_group=parallel_state.get_expert_model_parallel_group(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
        edp_group=parallel_state.get_expert_data_parallel_group(),
        host=host_groups(model=model_group, pp=pp_group, dp=dp_group, timeout=timeout),
    )


def shut_down_parallel() -> None:
    """Destroy the process groups, so that the processes can end."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
