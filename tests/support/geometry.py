"""Shapes of small models: numbers that are easy to multiply, with changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_rl.weights.geometry import ExpertGeometry, Geometry

# Two heads of 4 columns, each with keys and values of its own.
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


def small_experts(**changes: Any) -> ExpertGeometry:
    """Four experts of 8 columns, two of which a token is sent to."""
    experts = ExpertGeometry(
        num_experts=4,
        num_chosen=2,
        ffn_hidden_size=8,
        shared_ffn_hidden_size=0,
        is_normalised=True,
    )
    return replace(experts, **changes)
