"""Joins the shards of a layer's experts into full Hugging Face tensors, expert by expert, on one
rank.

The experts of a layer are divided among the expert-parallel ranks, in order, and each is sharded
over the expert tensor-parallel ranks. A rank sends all of its experts of the layer in one message,
or in several of at most `MESSAGE_ELEMENTS`: a message an expert would be thousands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist

from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.rules import TensorRule, hf_from_shard, join_parts, shard_shape

MESSAGE_ELEMENTS = 128 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldShards:
    """What this rank exports of its parameters. Example: `HeldShards(held={rule: parameter},
    dtype=torch.bfloat16)`.
    """

    held: Mapping[TensorRule, torch.nn.Parameter]
    dtype: torch.dtype  # of what is exported
    value: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach


def expert_tensors(
    rules: Sequence[TensorRule],
    shards: HeldShards,
    geometry: Geometry,
    parallel: Parallel,
    *,
    stage: int,
    target: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(Hugging Face name, full tensor)` on one rank, nothing on others. A collective over
    the EP x ETP ranks of the stage whose experts are exported, and the target; others return at
    once.

    Args:
        rules: those of all experts of one layer, expert by expert.
        stage: the pipeline rank that holds the layer.
        target: the global rank that gets the tensors.
    """
    if not parallel.holds_exported_experts:
        return
    num_shards = parallel.etp_group.size()
    by_expert = [list(of_expert) for _, of_expert in groupby(rules, key=lambda rule: rule.expert)]
    num_local = len(by_expert) // parallel.ep_group.size()
    of_one = sum(math.prod(shard_shape(rule, geometry, num_shards)) for rule in by_expert[0])
    at_once = max(1, MESSAGE_ELEMENTS // of_one)
    for ep_rank in range(parallel.ep_group.size()):
        own = by_expert[ep_rank * num_local : (ep_rank + 1) * num_local]
        for start in range(0, num_local, at_once):
            sent = [rule for expert in own[start : start + at_once] for rule in expert]
            received = []
            for etp_rank in range(num_shards):
                source = parallel.expert_holder(ep_rank, etp_rank, stage)
                received.append(_from_rank(source, target, sent, shards, geometry, parallel))
            if parallel.rank == target:
                yield from _joined(sent, geometry, received)


def _from_rank(
    source: int,
    target: int,
    rules: Sequence[TensorRule],
    shards: HeldShards,
    geometry: Geometry,
    parallel: Parallel,
) -> list[torch.Tensor]:
    """The source's shards of the rules' tensors on the target, nothing on other ranks."""
    if parallel.rank == source:
        own = [shards.value(shards.held[rule]) for rule in rules]
        if source == target:
            return own
        dist.send(torch.cat([shard.reshape(-1) for shard in own]), dst=target)
    if parallel.rank != target:
        return []
    shapes = [shard_shape(rule, geometry, parallel.etp_group.size()) for rule in rules]
    sizes = [math.prod(shape) for shape in shapes]
    received = torch.empty(sum(sizes), dtype=shards.dtype, device=parallel.device)
    dist.recv(received, src=source)
    parts = received.split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _joined(
    rules: Sequence[TensorRule], geometry: Geometry, shards: Sequence[Sequence[torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The full tensors of the rules, from the shards of each expert tensor-parallel rank."""
    for rule, of_rule in zip(rules, zip(*shards, strict=True), strict=True):
        pieces = [hf_from_shard(rule, geometry, shard) for shard in of_rule]
        for number, name in enumerate(rule.hf_names):
            yield name, join_parts(rule, geometry, [piece[number] for piece in pieces])
