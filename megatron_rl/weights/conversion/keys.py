"""Where a tensor lies in Megatron's distributed checkpoints, and which part of it a rank holds.

Tensors of the decoder layers have one key for all layers, with the layer as the first dimension,
and those of experts the expert as the second:

    decoder.layers.mlp.linear_fc1.weight                   [layers, 2 x ffn, hidden]
    decoder.layers.mlp.experts.experts.linear_fc1.weight   [layers, experts, 2 x ffn, hidden]

Checkpoints of models whose layers differ have a key for each layer instead; both are read, and the
first kind is written. In the whole tensors, rows of queries, keys and values are grouped by query
group, the up projection follows the gate, and the vocabulary is padded for the layout.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from megatron_rl.weights.conversion.distributed import Box
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.rules import TensorRule, cut_dimension, hf_shapes

LAYER = re.compile(r"^decoder\.layers\.\d+\.")
LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.\d+\.")
STATEFUL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")  # modules with extra state


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one Megatron tensor lies. Example: `Place(key="decoder.layers.mlp.linear_fc2.weight",
    lead=(3,))`.
    """

    key: str
    lead: tuple[int, ...]  # layer and expert, as far as the key's tensor holds all of them


def place_to_write(rule: TensorRule) -> Place:
    """Where Megatron's own checkpoints of a model of equal layers have the tensor."""
    return _places(rule)[-2]  # the last name is that of Transformer Engine's layers


def find_place(rule: TensorRule, keys: Container[str]) -> Place | None:
    """Where a checkpoint with these keys has the tensor; None if it has none."""
    return next((place for place in _places(rule) if place.key in keys), None)


def _places(rule: TensorRule) -> list[Place]:
    """The places that Megatron may use: for each name that of all layers, then of one layer."""
    places = []
    for name in rule.megatron_names:
        lead: tuple[int, ...] = ()
        if rule.expert is not None:
            if not LOCAL_EXPERT.search(name):
                continue  # Transformer Engine's experts are saved under the same key
            name, lead = LOCAL_EXPERT.sub(".experts.experts.", name), (rule.expert,)
        layers = () if rule.layer is None else (rule.layer,)
        places.append(Place(key=LAYER.sub("decoder.layers.", name), lead=layers + lead))
        places.append(Place(key=name, lead=lead))
    return places


def extra_state_key(rule: TensorRule, geometry: Geometry) -> str | None:
    """The key of the extra state of the tensor's module; None if Megatron expects none."""
    place = place_to_write(rule)
    module, _, kind = place.key.rpartition(".")
    if kind != "weight" or module.rpartition(".")[2] not in STATEFUL:
        return None
    counts = lead_shape(rule, geometry)
    return (
        f"{module}._extra_state/shard_{'.'.join(map(str, place.lead))}_{'.'.join(map(str, counts))}"
    )


def lead_shape(rule: TensorRule, geometry: Geometry) -> tuple[int, ...]:
    """The leading dimensions of the tensor of `place_to_write`: layers and experts."""
    layers = () if rule.layer is None else (geometry.num_layers,)
    experts = () if rule.expert is None else (geometry.experts.num_experts,)
    return layers + experts


def whole_shape(rule: TensorRule, geometry: Geometry, size: int) -> tuple[int, ...]:
    """The shape of one layer's whole tensor, padded for `size` tensor-parallel ranks."""
    shapes = hf_shapes(rule, geometry)
    rows = geometry.padded_vocab_size(size) if rule.kind == "vocab" else sum(s[0] for s in shapes)
    return (rows, *shapes[0][1:])


def boxes_of_rank(rule: TensorRule, geometry: Geometry, rank: int, size: int) -> list[Box]:
    """The parts of one layer's whole tensor that a tensor-parallel rank holds, in their order in
    its shard: one, or the gate's and the up projection's.
    """
    whole, dimension = whole_shape(rule, geometry, size), cut_dimension(rule.kind)
    if dimension is None:
        return [Box(starts=(0,) * len(whole), sizes=whole)]
    num_blocks = 2 if rule.kind == "gate_up" else 1
    width = whole[dimension] // (num_blocks * size)
    boxes = []
    for block in range(num_blocks):
        starts, sizes = [0] * len(whole), list(whole)
        starts[dimension] = (block * size + rank) * width
        sizes[dimension] = width
        boxes.append(Box(starts=tuple(starts), sizes=tuple(sizes)))
    return boxes
