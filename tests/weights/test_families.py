"""The records of the families, and what it takes to add one: a file."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from megatron_rl.errors import ConfigError
from megatron_rl.weights import families
from megatron_rl.weights.families.family import find_family, model_types
from megatron_rl.weights.geometry import read_geometry
from megatron_rl.weights.rules import (
    hf_from_shard,
    hf_shapes,
    join_parts,
    shard_from_hf,
    tensor_rules,
)

LLAMA_LIKE = """
from megatron_rl.weights.families import family, llama

FAMILY = family.ModelFamily(
    model_type="mistral",
    embedding=family.EMBEDDING,
    layer=llama.FAMILY.layer,
    final_norm=family.FINAL_NORM,
    head=family.HEAD,
    default_head_dim=None,
    accepted={**family.ACCEPTED, "sliding_window": ()},
)
"""
# Other names, biases, norms of the heads, and multipliers in config.json.
OWN_NAMES = """
from megatron_rl.weights.families import family
from megatron_rl.weights.families.family import TensorRow

ATTENTION = "decoder.layers.{layer}.self_attention."
PARTS = ("blocks.{layer}.att.query", "blocks.{layer}.att.key", "blocks.{layer}.att.value")
SIZES = ("query", "key_value", "key_value")

FAMILY = family.ModelFamily(
    model_type="own_names",
    embedding=TensorRow(
        kind="vocab",
        hf_names=("tokens.weight",),
        hf_shapes=(("vocab", "hidden"),),
        megatron_names=("embedding.word_embeddings.weight",),
    ),
    layer=(
        TensorRow(
            kind="qkv",
            hf_names=tuple(f"{part}.weight" for part in PARTS),
            hf_shapes=tuple((size, "hidden") for size in SIZES),
            megatron_names=(ATTENTION + "linear_qkv.weight",),
        ),
        TensorRow(
            kind="qkv",
            hf_names=tuple(f"{part}.bias" for part in PARTS),
            hf_shapes=tuple((size,) for size in SIZES),
            megatron_names=(ATTENTION + "linear_qkv.bias",),
        ),
        family.QUERY_NORM,
        family.KEY_NORM,
    ),
    final_norm=family.FINAL_NORM,
    head=family.HEAD,
    default_head_dim=8,
    accepted={**family.ACCEPTED, "embedding_multiplier": (1.0,)},
)
"""
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


@pytest.fixture
def add_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Puts a file into one more folder of the package `weights.families`."""
    added = []
    folder = tmp_path / "families"
    folder.mkdir()
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])

    def add(name: str, source: str) -> None:
        (folder / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        added.append(name)

    yield add
    for name in added:
        sys.modules.pop(f"megatron_rl.weights.families.{name}", None)
    find_family.cache_clear()


def write_config(folder: Path, **options: object) -> Path:
    (folder / "config.json").write_text(json.dumps(SHAPE | options))
    return folder


def assert_shards_round_trip(folder: Path) -> dict[str, tuple[int, ...]]:
    """Cut every tensor for TP 1 and 2 and join it again; returns the Hugging Face shapes."""
    geometry = read_geometry(folder)
    shapes = {}
    for rule in tensor_rules(geometry):
        of_rule = dict(zip(rule.hf_names, hf_shapes(rule, geometry), strict=True))
        tensors = {name: torch.randn(shape) for name, shape in of_rule.items()}

        def read(name: str, dimension: int | None, start: int, stop: int, tensors=tensors):
            tensor = tensors[name]
            return tensor if dimension is None else tensor.narrow(dimension, start, stop - start)

        for size in (1, 2):
            shards = [shard_from_hf(rule, geometry, read, rank, size) for rank in range(size)]
            parts = [hf_from_shard(rule, geometry, shard) for shard in shards]
            for index, name in enumerate(rule.hf_names):
                joined = join_parts(rule, geometry, [part[index] for part in parts])
                assert torch.equal(joined, tensors[name]), f"{name} over {size} ranks"
            if rule.kind != "replicated":
                assert sum(shard.numel() for shard in shards) >= sum(
                    tensor.numel() for tensor in tensors.values()
                )
        shapes |= of_rule
    return shapes


def test_a_family_is_found_by_the_name_of_its_file() -> None:
    assert model_types() == ("llama", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
    for model_type in model_types():
        assert find_family(model_type).model_type == model_type
    for name in ("family", "gpt2", "", "../llama", None):
        with pytest.raises(ConfigError, match="expected model_type one of llama, mixtral, qwen2"):
            find_family(name)


def test_a_new_dense_family_is_one_file(add_family: Callable, tmp_path: Path) -> None:
    MistralConfig(**SHAPE, head_dim=6, sliding_window=None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="got 'mistral' in config.json".replace(".", r"\.")):
        read_geometry(tmp_path)
    add_family("mistral", LLAMA_LIKE)
    geometry = read_geometry(tmp_path)
    assert (geometry.model_type, geometry.head_dim) == ("mistral", 6)
    assert not (geometry.has_qk_norm or geometry.has_qkv_bias)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert assert_shards_round_trip(tmp_path) == {
        name: tuple(tensor.shape) for name, tensor in model.named_parameters()
    }
    MistralConfig(**SHAPE, head_dim=6, sliding_window=32).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="sliding_window=32, which the learner does not build"):
        read_geometry(tmp_path)


def test_a_family_with_names_of_its_own(add_family: Callable, tmp_path: Path) -> None:
    add_family("own_names", OWN_NAMES)
    folder = write_config(tmp_path, model_type="own_names", embedding_multiplier=1.0)
    geometry = read_geometry(folder)
    assert (geometry.has_qk_norm, geometry.has_qkv_bias, geometry.head_dim) == (True, True, 8)
    shapes = assert_shards_round_trip(folder)
    assert shapes["tokens.weight"] == (131, 24)
    assert shapes["blocks.1.att.query.weight"] == (64, 24)
    assert shapes["blocks.1.att.key.bias"] == (32,)
    assert shapes["model.layers.1.self_attn.q_norm.weight"] == (8,)
    write_config(tmp_path, model_type="own_names", embedding_multiplier=12.0)
    with pytest.raises(ConfigError, match=r"embedding_multiplier=12\.0"):
        read_geometry(folder)


def test_a_file_that_describes_another_family_is_refused(add_family: Callable) -> None:
    add_family("olmo", LLAMA_LIKE)
    with pytest.raises(ConfigError, match="expected the family of its name, got 'mistral'"):
        find_family("olmo")
