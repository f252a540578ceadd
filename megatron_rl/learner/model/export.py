"""Joins Megatron's shards into full Hugging Face tensors, one at a time, in layer order.

The TP x PP ranks of the first copy of the model iterate `full_tensors` together. The shards of a
tensor are gathered over TP on its pipeline stage and sent to global rank 0, which is the only rank
that yields `(name, tensor)`. No rank ever holds more than one full tensor (with more TP ranks than
key-value heads: more than the queries, keys and values of one layer), and the other copies take no
part. The experts of a layer are sent by the ranks that hold them (export_experts.py).

A weight transport with a sender on each stage reads `owned_tensors` instead: the same tensors, each
on the first TP rank of its stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
import torch.distributed as dist

from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.build import held_parameters
from megatron_rl.learner.model.export_experts import HeldShards, expert_tensors
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.rules import (
    TensorRule,
    has_split_groups,
    hf_from_group_pieces,
    hf_from_shard,
    hf_shapes,
    join_parts,
    tensor_rules,
)
from megatron_rl.weights.stages import Layout


def tensor_shapes(geometry: Geometry) -> list[tuple[str, tuple[int, ...]]]:
    """Name and full shape of every tensor that `full_tensors` yields, in the same order."""
    return [
        (name, shape)
        for rule in tensor_rules(geometry)
        for name, shape in zip(rule.hf_names, hf_shapes(rule, geometry), strict=True)
    ]


def full_tensors(
    parts: Sequence[torch.nn.Module],
    geometry: Geometry,
    parallel: Parallel,
    *,
    value: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(Hugging Face name, full tensor)` on global rank 0, in the model's dtype; nothing on
    other ranks.

    A collective: every rank must run it to its end (`for _ in full_tensors(...): pass`).

    Args:
        parts: this rank's parts of the model.
        value: what to export of a parameter, of the parameter's shape.
    """
    if not (parallel.holds_exported_copy or parallel.holds_exported_experts):
        return
    held = dict(held_parameters(geometry, parallel, parts))
    dtype = value(next(iter(held.values()))).dtype
    for rules, stage, is_expert in _groups(geometry, parallel):
        if is_expert:
            shards = HeldShards(held=held, dtype=dtype, value=value)
            yield from expert_tensors(rules, shards, geometry, parallel, stage=stage, target=0)
        elif parallel.holds_exported_copy:
            for rule in rules:
                yield from _full(rule, held, geometry, parallel, dtype, value)


def _groups(geometry: Geometry, parallel: Parallel) -> Iterator[tuple[list[TensorRule], int, bool]]:
    """The rules in order, with the pipeline rank that holds their tensors and whether they are of
    experts; those of a layer's experts, which follow each other, together.
    """
    pipeline = geometry.parts(parallel.layout)
    for (_, is_expert), group in groupby(tensor_rules(geometry), key=_expert_layer):
        rules = list(group)
        yield rules, pipeline.rank_of(rules[0].part(pipeline)), is_expert


def _expert_layer(rule: TensorRule) -> tuple[int | None, bool]:
    return rule.layer, rule.expert is not None


def _full(
    rule: TensorRule,
    held: Mapping[TensorRule, torch.nn.Parameter],
    geometry: Geometry,
    parallel: Parallel,
    dtype: torch.dtype,
    value: Callable[[torch.nn.Parameter], torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The full tensors of a rule on global rank 0; nothing on the other ranks."""
    pipeline = geometry.parts(parallel.layout)
    stage = pipeline.rank_of(rule.part(pipeline))
    full_here: Iterator[torch.Tensor | None] = iter([None] * len(rule.hf_names))
    if stage == parallel.pp_rank:
        full_here = _joined(rule, geometry, parallel, value(held[rule]))
    shapes = hf_shapes(rule, geometry)
    for hf_name, full, shape in zip(rule.hf_names, full_here, shapes, strict=True):
        full = _to_first_rank(full, shape, dtype, stage, parallel)
        if full is not None:
            yield hf_name, full


def tensor_stages(geometry: Geometry, layout: Layout) -> list[int]:
    """The pipeline rank that holds each tensor of `tensor_shapes`, in the same order."""
    pipeline = geometry.parts(layout)
    return [
        pipeline.rank_of(rule.part(pipeline))
        for rule in tensor_rules(geometry)
        for _ in rule.hf_names
    ]


def owned_tensors(
    parts: Sequence[torch.nn.Module], geometry: Geometry, parallel: Parallel
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(Hugging Face name, full tensor)` of this pipeline stage, in the order of
    `tensor_shapes`, on its source of weights (`Parallel.is_weight_source`); nothing on other ranks.

    A collective over the ranks of each stage, all of which must run it to its end.
    """
    if not (parallel.holds_exported_copy or parallel.holds_exported_experts):
        return
    held = dict(held_parameters(geometry, parallel, parts))
    shards = HeldShards(held=held, dtype=next(iter(held.values())).dtype)
    for rules, stage, is_expert in _groups(geometry, parallel):
        if stage != parallel.pp_rank:
            continue
        if is_expert:
            target = parallel.expert_holder(0, 0, stage)
            yield from expert_tensors(rules, shards, geometry, parallel, stage=stage, target=target)
        elif parallel.holds_exported_copy:
            for rule in rules:
                joined = _joined(rule, geometry, parallel, held[rule].detach())
                for hf_name, full in zip(rule.hf_names, joined, strict=True):
                    if full is not None:
                        yield hf_name, full


def _joined(
    rule: TensorRule, geometry: Geometry, parallel: Parallel, shard: torch.Tensor
) -> Iterator[torch.Tensor | None]:
    """The rule's full tensors, one at a time, on TP rank 0 of the stage that owns them; None on its
    other ranks.
    """
    if has_split_groups(rule, geometry, parallel.tp_size):
        shards = _gathered(shard, parallel)
        none = [None] * len(rule.hf_names)
        yield from none if shards is None else hf_from_group_pieces(geometry, shards)
        return
    for piece in hf_from_shard(rule, geometry, shard):
        pieces: list[torch.Tensor] | None = [piece.contiguous()] if parallel.tp_rank == 0 else None
        if parallel.tp_size > 1 and rule.kind != "replicated":
            pieces = _gathered(piece, parallel)
        yield None if pieces is None else join_parts(rule, geometry, pieces)


def _gathered(piece: torch.Tensor, parallel: Parallel) -> list[torch.Tensor] | None:
    """The pieces of all TP ranks, in order, on TP rank 0; None on the others."""
    piece = piece.contiguous()
    pieces = None
    if parallel.tp_rank == 0:
        pieces = [torch.empty_like(piece) for _ in range(parallel.tp_size)]
    first = dist.get_global_rank(parallel.tp_group, 0)
    dist.gather(piece, pieces, dst=first, group=parallel.tp_group)
    return pieces


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
