"""Counts of parameters: those of published models, and those of each rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rl.plan.parameters import (
    largest_tensor,
    num_parameters,
    stage_expert_parameters,
    stage_layers,
    stage_parameters,
)
from megatron_rl.weights.geometry import read_geometry
from tests.plan.shapes import SHAPES, layout
from tests.support.geometry import SMALL, small_experts

# The elements of the published checkpoints, from the total sizes of their safetensors.
PUBLISHED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Mixtral-8x7B": 46_702_792_704,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_the_counts_are_those_of_the_published_models(name: str, count: int) -> None:
    assert num_parameters(read_geometry(SHAPES / name)) == count


def test_every_shape_has_a_published_count() -> None:
    assert {path.name for path in SHAPES.iterdir()} == set(PUBLISHED)


def test_the_stages_of_a_small_model() -> None:
    # A layer: norms 2 x 8, query 8 x 8, key and value 2 x 8 x 8, output 8 x 8, gate, up and down
    # 3 x 16 x 8: 656.
    assert num_parameters(SMALL) == 2 * 100 * 8 + 4 * 656 + 8
    assert largest_tensor(SMALL) == 800
    # The vocabulary is padded to 128 rows; a stage has two layers.
    first, last = (stage_parameters(SMALL, layout(pipeline=2), stage) for stage in (0, 1))
    assert (first, last) == (128 * 8 + 2 * 656, 2 * 656 + 8 + 128 * 8)
    # With TP2 the vocabulary is padded to 256 rows; only norms are whole on both ranks.
    half = stage_parameters(SMALL, layout(tensor=2, pipeline=2), 0)
    assert half == 128 * 8 + 2 * (16 + 320)


def test_the_experts_of_a_rank() -> None:
    experts = small_experts(ffn_hidden_size=6)
    mixture = replace(SMALL, model_type="mixtral", experts=experts)
    # A layer: 656 - 3 x 16 x 8 = 272 beside the feed-forward layer, the router 4 x 8, and each
    # expert 3 x 6 x 8 = 144.
    assert num_parameters(mixture) == 2 * 100 * 8 + 4 * (272 + 32 + 4 * 144) + 8
    half = layout(expert=2, pipeline=2)
    assert stage_expert_parameters(mixture, half, 0) == 2 * 2 * 144
    assert stage_parameters(mixture, half, 0) == 128 * 8 + 2 * (272 + 32) + 2 * 2 * 144
    assert stage_expert_parameters(mixture, layout(expert_tensor=2), 0) == 4 * 4 * 72
    assert stage_expert_parameters(SMALL, half, 0) == 0


def test_the_last_stage_of_a_tied_model_has_a_copy_of_the_embedding() -> None:
    tied = replace(SMALL, is_tied=True)
    assert stage_parameters(tied, layout(), 0) == 128 * 8 + 4 * 656 + 8
    assert stage_parameters(tied, layout(pipeline=2), 1) == 128 * 8 + 2 * 656 + 8


def test_the_layers_of_uneven_and_virtual_pipelines() -> None:
    uneven = layout(pipeline=2, stage_layers=(1, 3))
    assert [stage_layers(SMALL, uneven, stage) for stage in (0, 1)] == [1, 3]
    assert stage_parameters(SMALL, uneven, 0) == 128 * 8 + 656
    virtual = layout(pipeline=2, virtual_pipeline=2)
    assert stage_layers(SMALL, virtual, 0) == 2
