"""Hugging Face tensors to shards and back; no process group, no Megatron."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.rules import (
    cut_dimension,
    has_split_groups,
    hf_from_group_pieces,
    hf_from_shard,
    hf_shapes,
    join_parts,
    shard_from_hf,
    shard_shape,
    tensor_rules,
)
from megatron_rl.weights.stages import PipelineParts
from tests.learner.support.parity_models import by_expert
from tests.support.geometry import SMALL, small_experts

EXPERTS = {
    "qwen3_moe": small_experts(num_experts=12),
    "qwen2_moe": small_experts(shared_ffn_hidden_size=20, is_normalised=False),
    "mixtral": small_experts(ffn_hidden_size=40),
}
GEOMETRIES = {
    model_type: replace(
        SMALL,
        model_type=model_type,
        hidden_size=24,
        ffn_hidden_size=40,
        num_heads=8,
        num_query_groups=4,
        head_dim=6,  # 8 x 6 is not the hidden size
        vocab_size=vocab_size,
        has_qk_norm=model_type in ("qwen3", "qwen3_moe"),
        has_qkv_bias=model_type in ("qwen2", "qwen2_moe"),
        is_tied=is_tied,
        experts=EXPERTS.get(model_type),
    )
    for model_type, vocab_size, is_tied in (
        ("qwen3", 131, False),
        ("qwen2", 97, True),
        ("llama", 640, False),
        ("qwen3_moe", 131, False),
        ("qwen2_moe", 97, True),
        ("mixtral", 640, False),
    )
}


def checkpoint(geometry: Geometry) -> dict[str, torch.Tensor]:
    """Every tensor of the model, random."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for rule in tensor_rules(geometry)
        for name, shape in zip(rule.hf_names, hf_shapes(rule, geometry), strict=True)
    }


class Slices:
    """Reads slices as the checkpoint reader does, and counts what it read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.num_elements = 0

    def __call__(self, name: str, dimension: int | None, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name]
        if dimension is not None:
            tensor = tensor.narrow(dimension, start, stop - start)
        self.num_elements += tensor.numel()
        return tensor.clone()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("model_type", GEOMETRIES)
def test_round_trip_is_equal(model_type: str, size: int) -> None:
    geometry = GEOMETRIES[model_type]
    tensors = checkpoint(geometry)
    kinds = set()
    for rule in tensor_rules(geometry):
        kinds.add(rule.kind)
        shards = [
            shard_from_hf(rule, geometry, Slices(tensors), rank, size) for rank in range(size)
        ]
        assert len({tuple(shard.shape) for shard in shards}) == 1, "ranks hold equal shapes"
        parts_of_ranks = [hf_from_shard(rule, geometry, shard) for shard in shards]
        for index, name in enumerate(rule.hf_names):
            full = join_parts(rule, geometry, [parts[index] for parts in parts_of_ranks])
            assert torch.equal(full, tensors.pop(name)), f"{name} over {size} ranks"
    assert not tensors, "tensors that no rule names"
    assert kinds == {"vocab", "replicated", "qkv", "row", "gate_up"}


@pytest.mark.parametrize("model_type", GEOMETRIES)
def test_a_rank_reads_no_more_than_its_shard(model_type: str) -> None:
    geometry = GEOMETRIES[model_type]
    tensors = checkpoint(geometry)
    for rule in tensor_rules(geometry):
        for rank in range(4):
            read = Slices(tensors)
            shard = shard_from_hf(rule, geometry, read, rank, 4)
            assert read.num_elements <= shard.numel(), rule.hf_names


@pytest.mark.parametrize("model_type", GEOMETRIES)
def test_names_and_shapes_are_those_of_transformers(model_type: str) -> None:
    geometry = GEOMETRIES[model_type]
    config = AutoConfig.for_model(
        model_type,
        num_hidden_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.ffn_hidden_size,
        num_attention_heads=geometry.num_heads,
        num_key_value_heads=geometry.num_query_groups,
        head_dim=geometry.head_dim,
        vocab_size=geometry.vocab_size,
        tie_word_embeddings=geometry.is_tied,
        **expert_options(geometry),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {
        part: tuple(tensor.shape)
        for name, parameter in model.named_parameters()
        for part, tensor in by_expert(name, parameter, model_type)
    }
    found = {
        name: shape
        for rule in tensor_rules(geometry)
        for name, shape in zip(rule.hf_names, hf_shapes(rule, geometry), strict=True)
    }
    assert found == expected


def expert_options(geometry: Geometry) -> dict[str, int]:
    """Of config.json."""
    if geometry.experts is None:
        return {}
    experts = geometry.experts
    options = {"num_experts": experts.num_experts, "num_experts_per_tok": experts.num_chosen}
    if geometry.model_type == "mixtral":
        return options | {"num_local_experts": experts.num_experts}
    options["moe_intermediate_size"] = experts.ffn_hidden_size
    if experts.shared_ffn_hidden_size:
        options["shared_expert_intermediate_size"] = experts.shared_ffn_hidden_size
    return options


def test_experts_come_one_after_another_with_the_numbers_of_their_rank() -> None:
    rules = [rule for rule in tensor_rules(GEOMETRIES["qwen3_moe"]) if rule.expert is not None]
    assert [(rule.layer, rule.expert) for rule in rules[:5]] == [
        (0, 0),
        (0, 0),
        (0, 1),
        (0, 1),
        (0, 2),
    ]
    assert rules[22].hf_names == (
        "model.layers.0.mlp.experts.11.gate_proj.weight",
        "model.layers.0.mlp.experts.11.up_proj.weight",
    )
    # the second of two expert-parallel ranks has the experts 6 to 11
    assert rules[22].local_names(0, 6) == (
        "decoder.layers.0.mlp.experts.local_experts.5.linear_fc1.weight",
        "decoder.layers.0.mlp.experts.linear_fc1.weight5",
    )
    last = rules[-1]  # of layer 3, on a pipeline rank whose first layer is 2
    assert last.local_names(2, 0) == (
        "decoder.layers.1.mlp.experts.local_experts.11.linear_fc2.weight",
        "decoder.layers.1.mlp.experts.linear_fc2.weight11",
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shapes_of_shards(size: int) -> None:
    geometry = GEOMETRIES["qwen2_moe"]
    tensors = checkpoint(geometry)
    for rule in tensor_rules(geometry):
        if rule.kind != "vocab":  # which is padded
            shard = shard_from_hf(rule, geometry, Slices(tensors), size - 1, size)
            assert shard_shape(rule, geometry, size) == shard.shape


def small() -> Geometry:
    """4 heads of 1 in 2 groups, hidden size 1: small enough to write the rows down."""
    return replace(SMALL, hidden_size=1, ffn_hidden_size=4, num_heads=4, head_dim=1, vocab_size=131)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def rule_of(geometry: Geometry, kind: str, layer: int | None = 0):
    return next(r for r in tensor_rules(geometry) if r.kind == kind and r.layer == layer)


def test_queries_keys_and_values_stand_by_group() -> None:
    geometry = small()
    rule = rule_of(geometry, "qkv")
    values = (column(0, 1, 2, 3), column(10, 11), column(20, 21))
    tensors = dict(zip(rule.hf_names, values))
    whole = shard_from_hf(rule, geometry, Slices(tensors), 0, 1)
    assert whole[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    second = shard_from_hf(rule, geometry, Slices(tensors), 1, 2)
    assert second[:, 0].tolist() == [2, 3, 11, 21]


def test_more_ranks_than_groups_hold_pieces_of_a_group() -> None:
    geometry = small()
    rule = rule_of(geometry, "qkv")
    values = (column(0, 1, 2, 3), column(10, 11), column(20, 21))
    tensors = dict(zip(rule.hf_names, values))
    assert not has_split_groups(rule, geometry, 2)
    assert has_split_groups(rule, geometry, 4)
    shards = [shard_from_hf(rule, geometry, Slices(tensors), rank, 4) for rank in range(4)]
    assert [shard[:, 0].tolist() for shard in shards] == [[0, 1], [10, 20], [2, 3], [11, 21]]
    for full, expected in zip(hf_from_group_pieces(geometry, shards), values, strict=True):
        assert torch.equal(full, expected)


def test_gate_stands_before_up_on_each_rank() -> None:
    geometry = small()
    rule = rule_of(geometry, "gate_up")
    tensors = dict(zip(rule.hf_names, (column(0, 1, 2, 3), column(10, 11, 12, 13))))
    second = shard_from_hf(rule, geometry, Slices(tensors), 1, 2)
    assert second[:, 0].tolist() == [2, 3, 12, 13]


@pytest.mark.parametrize(("rank", "num_real"), [(0, 128), (1, 3), (2, 0), (3, 0)])
def test_rows_beyond_the_vocabulary_are_zero(rank: int, num_real: int) -> None:
    geometry = small()
    rule = rule_of(geometry, "vocab", None)
    tensors = {rule.hf_names[0]: column(*range(1, 132))}
    shard = shard_from_hf(rule, geometry, Slices(tensors), rank, 4)
    assert shard.shape == (128, 1)
    assert shard[:num_real, 0].tolist() == list(range(128 * rank + 1, 128 * rank + num_real + 1))
    assert not shard[num_real:].any()


def test_every_rule_has_its_pipeline_stage() -> None:
    parts = PipelineParts(num_ranks=2, num_layers=(1, 3))
    of_rules = [rule.part(parts) for rule in tensor_rules(small())]
    assert of_rules == sorted(of_rules), "layer order is the order of the parts"
    by_layer = {rule.layer: rule.part(parts) for rule in tensor_rules(small())}
    assert [by_layer[layer] for layer in range(4)] == [0, 1, 1, 1]
    outside = [rule for rule in tensor_rules(small()) if rule.layer is None]
    names = [rule.hf_names[0] for rule in outside]
    assert names == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert [rule.part(parts) for rule in outside] == [0, 1, 1]


def test_row_parallel_tensors_are_cut_along_their_columns() -> None:
    assert {kind: cut_dimension(kind) for kind in ("replicated", "row", "qkv", "vocab")} == {
        "replicated": None,
        "row": 1,
        "qkv": 0,
        "vocab": 0,
    }
