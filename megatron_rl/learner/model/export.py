"""Joins Megatron's shards into full Hugging Face tensors, one at a time, in layer order.

All ranks of the first data-parallel replica iterate `full_tensors` together. The shards of a tensor
are gathered over TP on its pipeline stage and sent to global rank 0, which is the only rank that
yields `(name, tensor)`. No rank ever holds more than one full tensor, and the other replicas take
no part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.build import stage_tensors
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.rules import (
    TensorRule,
    hf_from_shard,
    hf_shapes,
    join_parts,
    tensor_rules,
)


def tensor_shapes(geometry: Geometry) -> list[tuple[str, tuple[int, ...]]]:
    """Name and full shape of every tensor that `full_tensors` yields, in the same order."""
    return [
        (name, shape)
        for rule in tensor_rules(geometry)
        for name, shape in zip(rule.hf_names, hf_shapes(rule, geometry), strict=True)
    ]


def full_tensors(
    model: torch.nn.Module, geometry: Geometry, parallel: Parallel
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(Hugging Face name, full tensor)` on global rank 0, in the model's dtype; nothing on
    other ranks.

    A collective: every rank must run it to its end (`for _ in full_tensors(...): pass`).
    """
    if parallel.dp_rank != 0:
        return
    parameters = dict(model.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    names = dict(stage_tensors(geometry, parallel, parameters))
    for rule in tensor_rules(geometry):
        stage = rule.stage(geometry.num_layers, parallel.pp_size)
        parts = [None] * len(rule.hf_names)
        if stage == parallel.pp_rank:
            parts = hf_from_shard(rule, geometry, parameters[names[rule]].detach())
        shapes = hf_shapes(rule, geometry)
        for hf_name, part, shape in zip(rule.hf_names, parts, shapes, strict=True):
            full = None
            if part is not None:
                full = _join_over_tensor_parallel(rule, geometry, parallel, part.contiguous())
            full = _to_first_rank(full, shape, dtype, stage, parallel)
            if full is not None:
                yield hf_name, full


def _join_over_tensor_parallel(
    rule: TensorRule, geometry: Geometry, parallel: Parallel, part: torch.Tensor
) -> torch.Tensor | None:
    """The full tensor on TP rank 0 of the stage that owns it; None on its other ranks."""
    if parallel.tp_size == 1 or rule.kind == "replicated":
        return join_parts(rule, geometry, [part]) if parallel.tp_rank == 0 else None
    parts = (
        [torch.empty_like(part) for _ in range(parallel.tp_size)] if parallel.tp_rank == 0 else None
    )
    dist.gather(
        part, parts, dst=dist.get_global_rank(parallel.tp_group, 0), group=parallel.tp_group
    )
    return None if parts is None else join_parts(rule, geometry, parts)


def _to_first_rank(
    full: torch.Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    stage: int,
    parallel: Parallel,
) -> torch.Tensor | None:
    """The tensor on global rank 0, sent by the stage that owns it; None on the other ranks."""
    if stage == 0 or parallel.tp_rank != 0:
        return full
    if parallel.pp_rank == stage:
        dist.send(full.contiguous(), dst=dist.get_global_rank(parallel.pp_group, 0))
        return None
    if parallel.rank != 0:
        return None
    received = torch.empty(shape, dtype=dtype, device=parallel.device)
    dist.recv(received, src=dist.get_global_rank(parallel.pp_group, stage))
    return received
