"""Megatron's tensors and Hugging Face's: one table, read in both directions.

A Megatron tensor is made of one or more Hugging Face tensors, each cut along one dimension for
tensor parallelism:

- `linear_qkv` holds, for each query group, that group's query heads, its key head and its value
head;
- `linear_fc1` holds the gate's rows, then the up projection's;
- the embedding and the output layer are padded with zero rows up to 128 x TP.

`shard_from_hf` cuts what one TP rank needs (reading no more than that); `hf_from_shard` is its
inverse on one shard. Pure: names and tensors, no process group, no Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_rl.weights.geometry import Geometry

Kind = Literal["replicated", "column", "row", "vocab", "qkv", "gate_up"]
SliceReader = Callable[
    [str, int | None, int, int], torch.Tensor
]  # name, dimension, start, stop -> slice


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """One Megatron tensor and what it is made of.

    Example: `TensorRule(kind="qkv", hf_names=("...q_proj.weight", "...k_proj.weight",
    "...v_proj.weight"), megatron_names=("decoder.layers.0.self_attention.linear_qkv.weight",),
    layer=0)`. `layer` is None outside the decoder layers. `megatron_names` lists every name that a
    Megatron layer spec may use for it.
    """

    kind: Kind
    hf_names: tuple[str, ...]
    megatron_names: tuple[str, ...]
    layer: int | None
    is_last_stage: bool = (
        False  # of the tensors outside layers: on the last pipeline stage, else on the first
    )

    def stage(self, num_layers: int, pipeline_parallel: int) -> int:
        """The pipeline stage that owns the tensor."""
        if self.layer is None:
            return pipeline_parallel - 1 if self.is_last_stage else 0
        return self.layer // (num_layers // pipeline_parallel)


def tensor_rules(geometry: Geometry) -> list[TensorRule]:
    """Every tensor of the model in layer order: embedding, layers, final norm, output layer (none
    when tied).
    """
    rules = [
        TensorRule(
            kind="vocab",
            hf_names=("model.embed_tokens.weight",),
            megatron_names=("embedding.word_embeddings.weight",),
            layer=None,
        )
    ]
    for layer in range(geometry.num_layers):
        rules += _layer_rules(geometry, layer)
    rules.append(
        TensorRule(
            kind="replicated",
            hf_names=("model.norm.weight",),
            megatron_names=("decoder.final_layernorm.weight",),
            layer=None,
            is_last_stage=True,
        )
    )
    if not geometry.is_tied:
        rules.append(
            TensorRule(
                kind="vocab",
                hf_names=("lm_head.weight",),
                megatron_names=("output_layer.weight",),
                layer=None,
                is_last_stage=True,
            )
        )
    return rules


def _layer_rules(geometry: Geometry, layer: int) -> list[TensorRule]:
    hf, megatron = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    def rule(kind: Kind, hf_names: Sequence[str], *megatron_names: str) -> TensorRule:
        return TensorRule(
            kind=kind,
            hf_names=tuple(hf + name for name in hf_names),
            megatron_names=tuple(megatron + name for name in megatron_names),
            layer=layer,
        )

    rules = [
        # Megatron's own layers keep the norm apart; Transformer Engine's fuse it into the linear
        # layer that follows.
        rule(
            "replicated",
            ["input_layernorm.weight"],
            "input_layernorm.weight",
            "self_attention.linear_qkv.layer_norm_weight",
        ),
        rule("qkv", [f"{name}.weight" for name in qkv], "self_attention.linear_qkv.weight"),
    ]
    if geometry.has_qkv_bias:
        rules.append(
            rule("qkv", [f"{name}.bias" for name in qkv], "self_attention.linear_qkv.bias")
        )
    if geometry.has_qk_norm:
        rules.append(
            rule("replicated", ["self_attn.q_norm.weight"], "self_attention.q_layernorm.weight")
        )
        rules.append(
            rule("replicated", ["self_attn.k_norm.weight"], "self_attention.k_layernorm.weight")
        )
    rules += [
        rule("row", ["self_attn.o_proj.weight"], "self_attention.linear_proj.weight"),
        rule(
            "replicated",
            ["post_attention_layernorm.weight"],
            "pre_mlp_layernorm.weight",
            "mlp.linear_fc1.layer_norm_weight",
        ),
        rule("gate_up", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], "mlp.linear_fc1.weight"),
        rule("row", ["mlp.down_proj.weight"], "mlp.linear_fc2.weight"),
    ]
    return rules


def cut_dimension(kind: Kind) -> int | None:
    """The dimension of the *Hugging Face* tensors along which TP cuts; None where every rank holds
    all.
    """
    return {"replicated": None, "row": 1}.get(kind, 0)


def hf_shapes(rule: TensorRule, geometry: Geometry) -> list[tuple[int, ...]]:
    """The full shape of each of the rule's Hugging Face tensors."""
    hidden, heads, groups = geometry.hidden_size, geometry.num_heads, geometry.num_query_groups
    if rule.kind == "vocab":
        return [(geometry.vocab_size, hidden)]
    if rule.kind == "qkv":
        rows = [heads * geometry.head_dim, groups * geometry.head_dim, groups * geometry.head_dim]
        is_bias = rule.hf_names[0].endswith(".bias")
        return [(count,) if is_bias else (count, hidden) for count in rows]
    if rule.kind == "gate_up":
        return [(geometry.ffn_hidden_size, hidden)] * 2
    if rule.kind == "row":
        is_attention = "o_proj" in rule.hf_names[0]
        return [(hidden, heads * geometry.head_dim if is_attention else geometry.ffn_hidden_size)]
    is_head_norm = rule.hf_names[0].endswith(("q_norm.weight", "k_norm.weight"))
    return [(geometry.head_dim if is_head_norm else hidden,)]


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


def hf_from_shard(rule: TensorRule, geometry: Geometry, shard: torch.Tensor) -> list[torch.Tensor]:
    """This shard's part of each of the rule's Hugging Face tensors, in the order of
    `rule.hf_names`.

    The parts of all TP ranks, concatenated along `cut_dimension` and cut to the true vocabulary,
    are the full tensors.
    """
    if rule.kind == "qkv":
        return _split_qkv(shard, geometry)
    if rule.kind == "gate_up":
        return list(shard.chunk(2))
    return [shard]


def join_parts(rule: TensorRule, geometry: Geometry, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One full Hugging Face tensor from the parts of all TP ranks, in rank order."""
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
    """[q rows], [k rows], [v rows] -> per query group: its query heads, its key head, its value
    head.
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
