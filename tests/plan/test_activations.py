"""The bytes that a layer keeps for each position, worked by hand: hidden 8, heads' columns 8 and 8,
ffn 16, in bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rl.plan.activations import (
    backward_bytes,
    kept_by_head,
    kept_by_layer,
    layer_activations,
    loss_bytes,
)
from tests.plan.shapes import layout
from tests.support.geometry import SMALL


def test_a_layer_of_transformer_engine() -> None:
    found = layer_activations(SMALL, layout(), "cuda")
    # Of each norm its input and its result, and a float32; q k v, rotated q k, 4 x 4 for angles.
    assert found.norms == 2 * (2 * 8 * 2 + 4)
    assert found.attention == (24 + 16) * 2 + 4 * 4 * 2
    assert found.core_attention == 8 * 2 + 2 * 4
    assert found.feed_forward == 5 * 16 * 2
    assert found.total == 72 + 112 + 24 + 160


def test_a_layer_on_the_cpu() -> None:
    found = layer_activations(SMALL, layout(), "cpu")
    assert found.norms == 2 * (2 * 8 * 4 + 4 + 8 * 2)
    assert found.attention == 8 * 2 + 4 * 4 * 2
    assert found.core_attention == 2 * 16 * 2 + 2 * 4
    with_norms = layer_activations(replace(SMALL, has_qk_norm=True), layout(), "cpu")
    assert with_norms.attention - found.attention == 4 * (16 + 16) + 4 * 4


def test_tensor_parallelism_divides_all_but_the_norms_and_sequence_parallelism_these_too() -> None:
    whole = layer_activations(SMALL, layout(), "cuda")
    half = layer_activations(SMALL, layout(tensor=2), "cuda")
    assert (half.norms, half.feed_forward) == (whole.norms, whole.feed_forward / 2)
    sequence = layer_activations(SMALL, layout(tensor=2, is_sequence_parallel=True), "cuda")
    assert sequence.norms == 2 * (2 * 4 * 2 + 4)


@pytest.mark.parametrize(
    ("recomputation", "kept", "again"),
    [("none", 368, (8 - 16) * 2), ("selective", 72 + 112, 160), ("full", 8 * 2, 368)],
)
def test_recomputation_keeps_less(recomputation: str, kept: int, again: int) -> None:
    found = layout(recomputation=recomputation)
    assert kept_by_layer(SMALL, found, "cuda") == kept
    assert backward_bytes(SMALL, found, "cuda") == again + (2 * 16 + 2 * 8) * 2


def test_head_and_logits() -> None:
    assert kept_by_head(SMALL, layout(), "cuda") == 8 * 2 + 4 + 8 * 2
    # 128 columns of the padded vocabulary and their gradient; once more for an entropy's.
    assert loss_bytes(SMALL, layout()) == 2 * 128 * 2
    assert loss_bytes(SMALL, layout(tensor=2), has_entropy_gradient=True) == 3 * 128 * 2
