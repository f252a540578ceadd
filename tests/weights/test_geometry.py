"""What config.json says, and what the learner refuses to build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_rl.config import ParallelConfig
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.weights.geometry import (
    ExpertGeometry,
    layer_types,
    read_geometry,
    read_hf_config,
)
from tests.support.geometry import small_experts
from tests.weights.config_files import write


def test_reads_the_shape(tmp_path: Path) -> None:
    geometry = read_geometry(write(tmp_path))
    assert (geometry.num_layers, geometry.num_heads, geometry.num_query_groups) == (6, 8, 2)
    assert geometry.head_dim == 12
    assert (geometry.rope_theta, geometry.has_rope_scaling) == (500000.0, False)
    assert not (geometry.has_qk_norm or geometry.has_qkv_bias or geometry.is_tied)


def test_where_attention_costs_as_much_as_the_weights(tmp_path: Path) -> None:
    # Hidden size 96, 8 heads and 2 key-value heads of 12: projections to 96 + 24 + 24 columns and
    # from 96, and three products with 256 columns, 96 x 1008 weights; over 96 columns of the heads.
    geometry = read_geometry(write(tmp_path))
    assert geometry.attention_length == 1008
    experts = small_experts(num_experts=8, ffn_hidden_size=64, shared_ffn_hidden_size=32)
    # A token meets 2 of the 8 experts and the shared one: 240 + 3 x 160 columns.
    assert replace(geometry, experts=experts).attention_length == 720


@pytest.mark.parametrize(
    ("model_type", "has_qk_norm", "has_qkv_bias", "head_dim"),
    [("qwen3", True, False, 128), ("qwen2", False, True, 12), ("llama", False, False, 12)],
)
def test_what_a_model_type_brings_along(
    tmp_path: Path, model_type: str, has_qk_norm: bool, has_qkv_bias: bool, head_dim: int
) -> None:
    geometry = read_geometry(write(tmp_path, model_type=model_type))
    assert (geometry.has_qk_norm, geometry.has_qkv_bias) == (has_qk_norm, has_qkv_bias)
    assert geometry.head_dim == head_dim, "transformers' default where config.json has none"
    assert read_geometry(write(tmp_path, model_type=model_type, head_dim=32)).head_dim == 32


def test_without_key_value_heads_every_head_has_its_own(tmp_path: Path) -> None:
    assert read_geometry(write(tmp_path, num_key_value_heads=None)).num_query_groups == 8


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"model_type": "gpt2"},
            "expected model_type one of llama, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe, got "
            "'gpt2'",
        ),
        ({"model_type": "gpt_oss"}, "got 'gpt_oss'"),
        ({"model_type": None}, "got None"),
        ({"model_type": ["llama"]}, "got \"['llama']\""),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 5},
            "use_sliding_window=True",
        ),
        ({"layer_types": ["full_attention", *["sliding_attention"] * 5]}, "layer_types="),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type='dynamic'",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "longrope"}},
            "rope_type='longrope'",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
    ],
)
def test_refuses_what_the_learner_does_not_build(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_geometry(write(tmp_path, **changes))
    assert named in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_options_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    off = {"mlp_bias": False, "use_sliding_window": False, "quantization_config": {}}
    read_geometry(write(tmp_path, **off))
    layer_types = ["full_attention"] * 6
    read_geometry(write(tmp_path, attention_bias=False, hidden_act="silu", layer_types=layer_types))
    read_geometry(write(tmp_path, model_type="qwen2", attention_bias=True))  # is always there


@pytest.mark.parametrize(
    "window",
    [
        {"use_sliding_window": True, "max_window_layers": 6},
        {"use_sliding_window": True},  # from layer 28 on, by default
        {"use_sliding_window": False, "sliding_window": 128, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 6},
    ],
)
def test_a_window_of_no_layer_is_full_attention(tmp_path: Path, window: dict[str, Any]) -> None:
    folder = write(tmp_path, model_type="qwen2", **window)
    assert layer_types(read_hf_config(folder)) == ["full_attention"] * 6
    read_geometry(folder)
    # What vLLM reads (vllm/engine/arg_utils.py): layer types, and a window only without them.
    assert AutoConfig.from_pretrained(folder).layer_types == ["full_attention"] * 6


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_types": ["full_attention"] * 4}, "num_hidden_layers=6 layers, got 4"),
        ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads=3, got 8"),
        ({"hidden_size": "96"}, "numbers, got: unsupported operand"),
    ],
)
def test_a_config_that_contradicts_itself(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError, match=rf"config\.json: expected .*{named}"):
        read_geometry(write(tmp_path, **changes))


def test_a_folder_without_a_config_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a Hugging Face checkpoint with a config\.json"):
        read_geometry(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe\x00"])
def test_a_malformed_config_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.json: expected (JSON|a JSON object)"):
        read_geometry(tmp_path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a key 'intermediate_size', got none"):
        read_geometry(write(tmp_path, intermediate_size=None))


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ({"tensor": 3}, "parallel.tensor=3 does not divide the model's 8 attention heads"),
        ({"pipeline": 4}, "parallel.pipeline=4 does not divide the model's 6 layers"),
        (
            {"pipeline": 2, "virtual_pipeline": 2},
            "parallel.pipeline x parallel.virtual_pipeline=4 does not divide the model's 6 layers",
        ),
        (
            {"pipeline": 2, "stage_layers": [2, 3]},
            "parallel.stage_layers: expected the model's 6 layers in all, got 5",
        ),
    ],
)
def test_a_layout_that_does_not_divide(tmp_path: Path, layout: dict[str, Any], named: str) -> None:
    geometry = read_geometry(write(tmp_path))
    geometry.check_layout(ParallelConfig(tensor=2, pipeline=3))
    geometry.check_layout(ParallelConfig(tensor=4, pipeline=2, stage_layers=[1, 5]))
    with pytest.raises(ConfigError) as caught:
        geometry.check_layout(ParallelConfig(**layout))
    assert named in str(caught.value)
    assert "change parallel." in str(caught.value)


def test_a_feed_forward_layer_that_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="251 columns of the feed-forward layer"):
        read_geometry(write(tmp_path, intermediate_size=251)).check_layout(ParallelConfig(tensor=2))


def test_key_value_heads_and_ranks_that_do_not_divide_each_other(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 240}
    geometry = read_geometry(write(tmp_path, **sizes, hidden_size=48))
    geometry.check_layout(ParallelConfig(tensor=6))
    with pytest.raises(
        ConfigError, match=r"tensor=2: expected a divisor or a multiple of .* 3 key"
    ):
        geometry.check_layout(ParallelConfig(tensor=2))


@pytest.mark.parametrize(
    ("vocab_size", "tensor", "padded"), [(128, 1, 128), (131, 1, 256), (131, 2, 256), (97, 4, 512)]
)
def test_padded_vocabulary(tmp_path: Path, vocab_size: int, tensor: int, padded: int) -> None:
    geometry = read_geometry(write(tmp_path, vocab_size=vocab_size))
    assert geometry.padded_vocab_size(tensor) == padded


def write_experts(folder: Path, **options: Any) -> Path:
    return write(
        folder,
        **{
            "model_type": "qwen3_moe",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            **options,
        },
    )


def test_experts_are_read(tmp_path: Path) -> None:
    assert read_geometry(write(tmp_path)).experts is None
    assert read_geometry(write_experts(tmp_path)).experts == ExpertGeometry(
        num_experts=8,
        num_chosen=2,
        ffn_hidden_size=12,
        shared_ffn_hidden_size=0,
        is_normalised=True,
    )
    renamed = {"num_experts": None, "num_local_experts": 4, "norm_topk_prob": None}
    experts = read_geometry(write_experts(tmp_path, **renamed)).experts
    assert (experts.num_experts, experts.is_normalised) == (4, False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_experts": None}, "expected a key 'num_experts', got none"),
        ({"num_experts_per_tok": 9}, "expected num_experts_per_tok from 1 to 8"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2, which the learner does not build"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=[0], which the learner does not build"),
    ],
)
def test_experts_that_are_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        read_geometry(write_experts(tmp_path, **options))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ({"expert": 3}, "parallel.expert=3 does not divide the model's 8 experts"),
        ({"expert_tensor": 5}, "parallel.expert_tensor=5 does not divide the model's 12 columns"),
        ({"tensor": 2}, "parallel.sequence_parallel: expected true for a mixture of experts"),
    ],
)
def test_layouts_that_experts_do_not_allow(
    tmp_path: Path, layout: dict[str, Any], named: str
) -> None:
    geometry = read_geometry(write_experts(tmp_path))
    geometry.check_layout(ParallelConfig(expert=4, expert_tensor=3))
    geometry.check_layout(ParallelConfig(tensor=2, sequence_parallel=True, expert=8))
    with pytest.raises(ConfigError) as caught:
        geometry.check_layout(ParallelConfig(**layout))
    assert named in str(caught.value)


def test_a_dense_model_has_no_expert_parallelism(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.expert=2: expected 1 for a model without"):
        read_geometry(write(tmp_path)).check_layout(ParallelConfig(expert=2))
