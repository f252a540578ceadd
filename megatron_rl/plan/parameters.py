"""The number of parameters of a model, and of the part of it that a rank holds."""

from __future__ import annotations

import math

from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.rules import TensorRule, hf_shapes, tensor_rules


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


def stage_parameters(geometry: Geometry, *, stage: int, tensor: int, pipeline: int) -> int:
    """The parameters that each rank of a pipeline stage holds, with the padding of the vocabulary
    and, on the last stage of a tied model, its copy of the embedding.
    """
    rules = tensor_rules(geometry)
    held = [rule for rule in rules if rule.stage(geometry.num_layers, pipeline) == stage]
    if geometry.is_tied and pipeline > 1 and stage == pipeline - 1:
        held.append(rules[0])
    return sum(shard_size(rule, geometry, tensor) for rule in held)


def shard_size(rule: TensorRule, geometry: Geometry, tensor: int) -> int:
    """The elements of one rank's shard of a Megatron tensor."""
    shapes = hf_shapes(rule, geometry)
    if rule.kind == "vocab":
        return geometry.padded_vocab_size(tensor) // tensor * shapes[0][1]
    total = sum(math.prod(shape) for shape in shapes)
    return total if rule.kind == "replicated" else total // tensor
