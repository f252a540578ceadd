"""The correspondence between Megatron's tensors and Hugging Face's, in both directions.

A Megatron tensor consists of one or more Hugging Face tensors, each of which is sharded along one
dimension for tensor parallelism:

- `linear_qkv` holds, for each query group, the group's query heads, its key head and its value
  head; with more TP ranks than groups, the ranks of a group hold equal pieces of these rows;
- `linear_fc1` holds the gate's rows, then the up projection's;
- the embedding and the output layer are padded with zero rows up to 128 x TP.

Tensors of experts are sharded over the expert tensor-parallel ranks in the same way; the experts
themselves are divided among the expert-parallel ranks, in order.

`shard_from_hf` builds the shard of one TP rank and reads only the slices that it needs;
`hf_from_shard` is its inverse for one shard. The record of a model's family (`weights/families/`)
lists its tensors. This module works on names and tensors only, without process groups and without
Megatron.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch

from megatron_rl.weights.families.family import Kind, Size, TensorRow, find_family
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.stages import PipelineParts

SliceReader = Callable[
    [str, int | None, int, int], torch.Tensor
]  # name, dimension, start, stop -> slice


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """One Megatron tensor of a model, and the Hugging Face tensors that it consists of.

    Example: `TensorRule(kind="row", hf_names=("model.layers.0.mlp.down_proj.weight",),
    hf_shapes=(("hidden", "ffn"),), megatron_names=("decoder.layers.0.mlp.linear_fc2.weight",),
    layer=0, is_last_stage=False)`.
    """

    kind: Kind
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[Size, ...], ...]  # symbolic; `hf_shapes()` returns the numbers
    megatron_names: tuple[str, ...]  # every name that a Megatron layer spec may use for it
    layer: int | None  # None for a tensor outside the decoder layers
    is_last_stage: bool  # for such a tensor: on the last pipeline stage, otherwise on the first
    expert: int | None = None  # the number of the expert that the tensor belongs to

    def local_names(self, first_layer: int, first_expert: int) -> tuple[str, ...]:
        """The names in a part of the model that numbers its own layers and experts from 0.

        Args:
            first_layer, first_expert: the model's numbers of the part's first ones.
        """
        names = self.megatron_names
        if self.layer is not None:
            here = f"decoder.layers.{self.layer - first_layer}."
            names = tuple(name.replace(f"decoder.layers.{self.layer}.", here) for name in names)
        if self.expert is None:
            return names
        # the number ends in a dot in Megatron's own experts, or ends the name
        number, here = re.compile(rf"(local_experts\.|weight){self.expert}(?=\.|$)"), self.expert
        return tuple(number.sub(rf"\g<1>{here - first_expert}", name) for name in names)

    def part(self, parts: PipelineParts) -> int:
        """The part of the pipeline that owns the tensor."""
        if self.layer is None:
            return parts.last if self.is_last_stage else 0
        return parts.part_of(self.layer)


def tensor_rules(geometry: Geometry) -> list[TensorRule]:
    """Every tensor of the model in layer order: embedding, layers, final norm, and the output layer
    unless it is tied.
    """
    return list(_rules(geometry))


@lru_cache(maxsize=16)  # a mixture of experts has tens of thousands
def _rules(geometry: Geometry) -> tuple[TensorRule, ...]:
    family = find_family(geometry.model_type)
    rules = [_rule(family.embedding, layer=None, is_last_stage=False)]
    for layer in range(geometry.num_layers):
        rules += _layer_rules(family.layer, geometry, layer)
    rules.append(_rule(family.final_norm, layer=None, is_last_stage=True))
    if not geometry.is_tied:
        rules.append(_rule(family.head, layer=None, is_last_stage=True))
    return tuple(rules)


def _layer_rules(rows: Sequence[TensorRow], geometry: Geometry, layer: int) -> Iterator[TensorRule]:
    """The tensors of a layer. Rows of experts that follow each other are repeated together, expert
    by expert.
    """
    num_experts = geometry.experts.num_experts if geometry.experts else 0
    for is_expert, group in groupby(rows, key=lambda row: row.is_expert):
        together = list(group)
        for expert in range(num_experts) if is_expert else (None,):
            for row in together:
                yield _rule(row, layer=layer, is_last_stage=False, expert=expert)


def _rule(
    row: TensorRow, *, layer: int | None, is_last_stage: bool, expert: int | None = None
) -> TensorRule:
    return TensorRule(
        kind=row.kind,
        hf_names=tuple(name.format(layer=layer, expert=expert) for name in row.hf_names),
        hf_shapes=row.hf_shapes,
        megatron_names=tuple(
            name.format(layer=layer, expert=expert) for name in row.megatron_names
        ),
        layer=layer,
        is_last_stage=is_last_stage,
        expert=expert,
    )


def cut_dimension(kind: Kind) -> int | None:
    """The dimension of the *Hugging Face* tensors along which tensor parallelism shards them; None
    if every rank holds the whole tensors.
    """
    return {"replicated": None, "row": 1}.get(kind, 0)


def hf_shapes(rule: TensorRule, geometry: Geometry) -> list[tuple[int, ...]]:
    """The full shape of each of the rule's Hugging Face tensors."""
    counts: dict[Size, int] = {
        "hidden": geometry.hidden_size,
        "ffn": geometry.ffn_hidden_size,
        "query": geometry.num_heads * geometry.head_dim,
        "key_value": geometry.num_query_groups * geometry.head_dim,
        "head": geometry.head_dim,
        "vocab": geometry.vocab_size,
        "one": 1,
    }
    if geometry.experts:
        counts["experts"] = geometry.experts.num_experts
        counts["expert_ffn"] = geometry.experts.ffn_hidden_size
        counts["shared_ffn"] = geometry.experts.shared_ffn_hidden_size
    return [tuple(counts[size] for size in shape) for shape in rule.hf_shapes]


def shard_from_hf(
    rule: TensorRule, geometry: Geometry, read: SliceReader, rank: int, size: int
) -> torch.Tensor:
    """The Megatron shard of TP rank `rank` of `size`, from slices of the Hugging Face tensors.

    Args:
        read: `(name, dimension, start, stop) -> tensor`; dimension None reads the whole tensor.
    """
    dimension = cut_dimension(rule.kind)
    if rule.kind == "vocab":
        return _read_vocab_shard(rule, geometry, read, rank, size)
    if has_split_groups(rule, geometry, size):
        ranks_per_group = size // geometry.num_query_groups
        group = shard_from_hf(
            rule, geometry, read, rank // ranks_per_group, geometry.num_query_groups
        )
        return group.chunk(ranks_per_group)[rank % ranks_per_group]
    parts = []
    for name, shape in zip(rule.hf_names, hf_shapes(rule, geometry), strict=True):
        if dimension is None:
            parts.append(read(name, None, 0, 0))
        else:
            width = shape[dimension] // size
            parts.append(read(name, dimension, rank * width, (rank + 1) * width))
    if rule.kind == "qkv":
        return _interleave_qkv(parts, geometry)
    return torch.cat(parts) if rule.kind == "gate_up" else parts[0]


def shard_shape(rule: TensorRule, geometry: Geometry, size: int) -> tuple[int, ...]:
    """The shape of one rank's shard of a tensor without padding that `size` ranks divide."""
    dimension = cut_dimension(rule.kind)
    cut = [list(shape) for shape in hf_shapes(rule, geometry)]
    if dimension is not None:
        for shape in cut:
            shape[dimension] //= size
    return (sum(shape[0] for shape in cut), *cut[0][1:])


def hf_from_shard(rule: TensorRule, geometry: Geometry, shard: torch.Tensor) -> list[torch.Tensor]:
    """This shard's part of each of the rule's Hugging Face tensors, in the order of
    `rule.hf_names`; `join_parts` joins the parts of all TP ranks to a full tensor.
    """
    if rule.kind == "qkv":
        return _split_qkv(shard, geometry)
    if rule.kind == "gate_up":
        return list(shard.chunk(2))
    return [shard]


def has_split_groups(rule: TensorRule, geometry: Geometry, size: int) -> bool:
    """Whether the shards of `size` TP ranks are pieces of query groups. Then `hf_from_shard` does
    not apply, and `hf_from_group_pieces` does.
    """
    return rule.kind == "qkv" and size > geometry.num_query_groups


def hf_from_group_pieces(geometry: Geometry, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The full query, key and value tensors, from the `linear_qkv` shards of all TP ranks."""
    return _split_qkv(torch.cat(list(shards)), geometry)


def join_parts(rule: TensorRule, geometry: Geometry, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One full Hugging Face tensor, without padding, from the parts of all TP ranks in order."""
    dimension = cut_dimension(rule.kind)
    if dimension is None:
        return parts[0]
    full = torch.cat(list(parts), dim=dimension)
    return full[: geometry.vocab_size] if rule.kind == "vocab" else full


def _read_vocab_shard(
    rule: TensorRule, geometry: Geometry, read: SliceReader, rank: int, size: int
) -> torch.Tensor:
    width = geometry.padded_vocab_size(size) // size
    start, stop = rank * width, min((rank + 1) * width, geometry.vocab_size)
    if start >= stop:  # this rank's rows are all padding
        some = read(rule.hf_names[0], 0, 0, 1)
        return some.new_zeros(width, some.shape[1])
    rows = read(rule.hf_names[0], 0, start, stop)
    if rows.shape[0] == width:
        return rows
    return torch.cat([rows, rows.new_zeros(width - rows.shape[0], rows.shape[1])])


def _interleave_qkv(parts: Sequence[torch.Tensor], geometry: Geometry) -> torch.Tensor:
    """Reorder query, key and value rows so that each query group has its query heads, its key head
    and its value head together.
    """
    query, key, value = parts
    rest = query.shape[1:]
    groups = key.shape[0] // geometry.head_dim
    grouped = [part.reshape(groups, -1, *rest) for part in (query, key, value)]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _split_qkv(shard: torch.Tensor, geometry: Geometry) -> list[torch.Tensor]:
    heads_per_group = geometry.num_heads // geometry.num_query_groups
    rows = [heads_per_group * geometry.head_dim, geometry.head_dim, geometry.head_dim]
    grouped = shard.reshape(-1, sum(rows), *shard.shape[1:])
    return [part.reshape(-1, *shard.shape[1:]) for part in grouped.split(rows, dim=1)]
