"""Shapes of models, and plans, that tests of this folder share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rl.plan.layout import ClusterLayout
from megatron_rl.weights.geometry import Geometry

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"

# Two heads of 4 columns and one key-value head; sizes that are easy to multiply.
SMALL = Geometry(
    model_type="llama",
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=16,
    num_heads=2,
    num_query_groups=2,
    head_dim=4,
    vocab_size=100,
    max_position_embeddings=64,
    norm_epsilon=1e-6,
    has_qk_norm=False,
    has_qkv_bias=False,
    is_tied=False,
    rope_theta=10000.0,
    has_rope_scaling=False,
)


def layout(**changes: Any) -> ClusterLayout:
    """One rank in bfloat16, with changes."""
    single = ClusterLayout(
        num_nodes=1,
        gpus_per_node=1,
        tensor=1,
        pipeline=1,
        data=1,
        dtype="bfloat16",
        has_distributed_optimizer=False,
    )
    return replace(single, **changes)
