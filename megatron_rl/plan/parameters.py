"""The number of parameters of a model, and of the part of it that a rank holds."""

from __future__ import annotations

import math

from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.rules import TensorRule, hf_shapes, tensor_rules
from megatron_rl.weights.stages import Layout


def tensor_shapes(geometry: Geometry) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every Hugging Face tensor of the model, in layer order."""
    return [
        pair
        for rule in tensor_rules(geometry)
        for pair in zip(rule.hf_names, hf_shapes(rule, geometry), strict=True)
    ]


def num_parameters(geometry: Geometry) -> int:
    """The parameters of the whole model: the elements of its Hugging Face tensors."""
    return sum(math.prod(shape) for _, shape in tensor_shapes(geometry))


def largest_tensor(geometry: Geometry) -> int:
    """The elements of the model's largest Hugging Face tensor."""
    return max(math.prod(shape) for _, shape in tensor_shapes(geometry))


def stage_parameters(geometry: Geometry, layout: Layout, stage: int) -> int:
    """The parameters that each rank of a pipeline stage holds in all its parts, with the padding of
    the vocabulary and, on the last stage of a tied model, its copy of the embedding.
    """
    parts, rules = geometry.parts(layout), tensor_rules(geometry)
    held = [
        rule for rule in rules if rule.expert is None and parts.rank_of(rule.part(parts)) == stage
    ]
    if geometry.is_tied and layout.pipeline > 1 and stage == layout.pipeline - 1:
        held.append(rules[0])
    dense = sum(shard_size(rule, geometry, layout.tensor) for rule in held)
    return dense + stage_expert_parameters(geometry, layout, stage)


def stage_expert_parameters(geometry: Geometry, layout: Layout, stage: int) -> int:
    """The parameters of experts that each rank of a pipeline stage holds; 0 for a dense model."""
    if geometry.experts is None:
        return 0
    of_layer = [rule for rule in tensor_rules(geometry) if rule.expert == 0 and rule.layer == 0]
    of_expert = sum(shard_size(rule, geometry, layout.expert_tensor) for rule in of_layer)
    num_experts = geometry.experts.num_experts // layout.expert
    return of_expert * num_experts * stage_layers(geometry, layout, stage)


def stage_layers(geometry: Geometry, layout: Layout, stage: int) -> int:
    """The decoder layers of a pipeline stage."""
    parts = geometry.parts(layout)
    return sum(parts.num_layers[part] for part in parts.of_rank(stage))


def shard_size(rule: TensorRule, geometry: Geometry, tensor: int) -> int:
    """The elements of one rank's shard of a Megatron tensor."""
    shapes = hf_shapes(rule, geometry)
    if rule.kind == "vocab":
        return geometry.padded_vocab_size(tensor) // tensor * shapes[0][1]
    total = sum(math.prod(shape) for shape in shapes)
    return total if rule.kind == "replicated" else total // tensor
