"""[imports megatron] The state of Megatron's distributed optimizer in a checkpoint, one parameter
at a time.

Each data-parallel rank holds a contiguous part of every bucket of parameters, and so pieces of some
parameters. In the checkpoint the state of a parameter has the parameter's own shape and name, so
that any layout can read it:

- `sharded_optimizer` gathers the pieces of each parameter on one rank, its owner, which writes it.
  The owners take turns, so that a rank holds in host memory about as much as its own part.
- `load_optimizer` reads the parameters of which this rank holds a piece, LOAD_BYTES at a time.

Megatron's own format `fully_reshardable` (optimizer/distrib_optimizer.py) has the same tensors
under the same names. But it copies the state of all ranks to the host of every rank, and with
several buckets it takes the pieces from the wrong places, as it leaves out the padding between
buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.learner.model.optimizer_parts import chained_optimizers

LOAD_BYTES = 2**30  # of host memory that a load takes at a time
KEYS = ("param", "exp_avg", "exp_avg_sq")  # a float32 main weight and its moments
# Of a group of parameters: what it is a group of, and the ends of its schedules.
GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
SCHEDULE_KEYS = ("max_lr", "min_lr", "start_wd", "end_wd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """How a parameter is divided over the data-parallel ranks. Example of 10 elements, of which
    rank 1 of 3 holds the first 6 and rank 2 the others: `Pieces(parameter=weight, ranges=((0, 0),
    (0, 6), (6, 10)))`.
    """

    parameter: torch.nn.Parameter
    ranges: tuple[tuple[int, int], ...]  # start and end in the flat parameter, of each rank

    def owner(self, load: list[int]) -> int:
        """The rank that writes it: of those that hold a piece, the one with the least so far in
        `load`, to which it is added.
        """
        holders = [rank for rank, (start, end) in enumerate(self.ranges) if end > start]
        chosen = min(holders, key=lambda rank: (load[rank], rank))
        load[chosen] += self.parameter.numel()
        return chosen


def sharded_optimizer(optimizer: Any, model_state: Mapping[str, Any]) -> dict[str, Any]:
    """What this rank writes of Megatron's distributed optimizers: settings and step counts, and the
    tensors of the parameters that it owns. A collective over all ranks.

    Args:
        model_state: the model's sharded state dict, which says how parameters are divided over
            tensor-parallel ranks.
    """
    parts = chained_optimizers(optimizer)
    if len(parts) > 1:
        optimizer._synchronize_steps()
    states = [
        part.state_dict() | {"param_state": _sharded_state(part, model_state)} for part in parts
    ]
    return states[0] if len(states) == 1 else {str(n): state for n, state in enumerate(states)}


def load_settings(optimizer: Any, loaded: Mapping[str, Any]) -> None:
    """Set settings and step counts, as `sharded_optimizer` has written them."""
    parts = chained_optimizers(optimizer)
    states = [loaded] if len(parts) == 1 else [loaded[str(n)] for n in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict({key: value for key, value in state.items() if key != "param_state"})
    if len(parts) > 1:
        optimizer._synchronize_steps()


def follow_config(loaded: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Give the groups in a loaded optimizer the learning rates and weight decay of this run.

    Megatron-Core 0.19 tells groups apart by these too, and would refuse a run that goes on with
    another learning rate.

    Args:
        loaded: the state of an optimizer, of any depth; its "param_groups" are changed.
        groups: of this run's optimizer.
    """
    if not isinstance(loaded, dict):
        return
    for group in loaded.get("param_groups", ()):
        for own in groups:
            if all(group.get(key) == own.get(key) for key in GROUP_KEYS):
                group.update({key: own[key] for key in SCHEDULE_KEYS if key in own})
    for inner in loaded.values():
        follow_config(inner, groups)


def load_optimizer(optimizer: Any, model_state: Mapping[str, Any], folder: Path) -> None:
    """Read the tensors of which this rank holds a piece. A collective over all ranks."""
    parts = chained_optimizers(optimizer)
    shard_of = _model_shards(model_state)
    for number in range(_largest(len(parts))):
        _load_state(parts[number] if number < len(parts) else None, shard_of, folder)


def _divided_parameters(optimizer: Any) -> Iterator[Pieces]:
    """Every parameter of a distributed optimizer, in the same order on all of its ranks."""
    size = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for parameter, (first, last, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            part = bucket.grad_data.numel() // size
            ranges = []
            for rank in range(size):
                start = bucket.offset + rank * part
                inside = max(first, start) - first, min(last, start + part) - first
                ranges.append(inside if inside[1] > inside[0] else (0, 0))
            yield Pieces(parameter=parameter, ranges=tuple(ranges))


def _sharded_state(optimizer: Any, model_state: Mapping[str, Any]) -> dict[str, Any]:
    """For each parameter that this rank owns, under its number, the tensors of KEYS as Megatron's
    shards. A collective over the ranks of the optimizer.
    """
    shard_of = _model_shards(model_state)
    group = optimizer.data_parallel_group
    load, found = [0] * group.size(), {}
    for number, pieces in enumerate(_divided_parameters(optimizer)):
        owner = pieces.owner(load)
        full = {key: _gather(optimizer, pieces, key, owner) for key in KEYS}
        if group.rank() == owner:
            shard = shard_of[id(pieces.parameter)]
            found[str(number)] = {key: _shard_like(shard, key, full[key]) for key in KEYS}
    return found


def _chunks(optimizer: Any | None) -> list[list[Pieces]]:
    """The parameters of which this rank holds a piece, in chunks of LOAD_BYTES at the most."""
    chunks: list[list[Pieces]] = [[]]
    num_bytes = 0
    for pieces in _divided_parameters(optimizer) if optimizer is not None else ():
        start, end = pieces.ranges[optimizer.data_parallel_group.rank()]
        if end == start:
            continue
        size = 4 * len(KEYS) * pieces.parameter.numel()
        if chunks[-1] and num_bytes + size > LOAD_BYTES:
            chunks.append([])
            num_bytes = 0
        chunks[-1].append(pieces)
        num_bytes += size
    return chunks


def _load_state(optimizer: Any | None, shard_of: Mapping[int, Any], folder: Path) -> None:
    from megatron.core import dist_checkpointing

    chunks = _chunks(optimizer)
    for number in range(_largest(len(chunks))):
        chunk = chunks[number] if number < len(chunks) else []
        wanted = {
            str(index): {
                key: _shard_like(
                    shard_of[id(pieces.parameter)],
                    key,
                    torch.empty(pieces.parameter.shape, dtype=torch.float32, device="cpu"),
                )
                for key in KEYS
            }
            for index, pieces in enumerate(chunk)
        }
        loaded = dist_checkpointing.load(
            {"state": wanted}, str(folder), validate_access_integrity=False
        )
        for index, pieces in enumerate(chunk):
            start, end = pieces.ranges[optimizer.data_parallel_group.rank()]
            own = optimizer._get_main_param_and_optimizer_states(pieces.parameter)
            for key in KEYS:
                own[key].detach().copy_(loaded["state"][str(index)][key].flatten()[start:end])


def _gather(optimizer: Any, pieces: Pieces, key: str, owner: int) -> torch.Tensor | None:
    """The whole tensor on the host of its owner; None on the other ranks."""
    group = optimizer.data_parallel_group
    rank, (start, end) = group.rank(), pieces.ranges[group.rank()]
    own = None
    if end > start:
        own = optimizer._get_main_param_and_optimizer_states(pieces.parameter)[key].detach()
    if rank != owner:
        if own is not None:
            dist.send(own.contiguous(), dst=dist.get_global_rank(group, owner), group=group)
        return None
    assert own is not None  # an owner holds a piece
    full = torch.empty(pieces.parameter.numel(), dtype=own.dtype, device="cpu")
    full[start:end].copy_(own)
    for other, (first, last) in enumerate(pieces.ranges):
        if other != rank and last > first:
            received = torch.empty(last - first, dtype=own.dtype, device=own.device)
            dist.recv(received, src=dist.get_global_rank(group, other), group=group)
            full[first:last].copy_(received)
    return full.view(pieces.parameter.shape)


def _model_shards(model_state: Mapping[str, Any]) -> dict[int, Any]:
    """The shard, or the factory of shards, of each of the model's parameters, by its id."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    shards, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(shard.data): shard for shard in nested_values(shards)}


def _shard_like(shard: Any, key: str, values: torch.Tensor) -> Any:
    """A shard of the optimizer's state with the place of a parameter's shard. Its replica of the
    data-parallel rank is the first one, since only one rank writes it.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    of_type = {"dtype": values.dtype} if isinstance(shard, ShardedTensor) else {}
    return replace(
        shard,
        key=f"optimizer.state.{key}.{shard.key}",
        data=values,
        replica_id=(*shard.replica_id[:2], 0),
        **of_type,
    )


def _largest(count: int) -> int:
    """The largest number of all ranks."""
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return max(counts)
