"""The parts of a pipeline and the layers that they hold, worked by hand."""

from __future__ import annotations

import pytest

from megatron_rl.config import ParallelConfig
from megatron_rl.errors import ConfigError
from megatron_rl.weights.stages import PipelineParts, pipeline_parts


def test_equal_parts_of_a_virtual_pipeline() -> None:
    parts = pipeline_parts(ParallelConfig(pipeline=2, virtual_pipeline=2), 8)
    # Narayanan et al. 2021: rank 0 holds layers 0, 1, 4, 5; rank 1 holds 2, 3, 6, 7
    assert parts == PipelineParts(num_ranks=2, num_layers=(2, 2, 2, 2))
    assert [list(parts.of_rank(rank)) for rank in (0, 1)] == [[0, 2], [1, 3]]
    assert [parts.rank_of(parts.part_of(layer)) for layer in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_parts_of_different_sizes() -> None:
    parts = pipeline_parts(ParallelConfig(pipeline=3, stage_layers=[1, 4, 2]), 7)
    assert [parts.part_of(layer) for layer in range(7)] == [0, 1, 1, 1, 1, 2, 2]
    assert [parts.first_layer(part) for part in range(3)] == [0, 1, 5]
    assert parts.last == 2


def test_one_part() -> None:
    parts = pipeline_parts(ParallelConfig(), 5)
    assert parts == PipelineParts(num_ranks=1, num_layers=(5,))
    assert [parts.part_of(layer) for layer in range(5)] == [0] * 5


def test_layers_that_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match="pipeline=3 does not divide the model's 7 layers"):
        pipeline_parts(ParallelConfig(pipeline=3), 7)
    with pytest.raises(ConfigError, match="stage_layers: expected the model's 7 layers in all"):
        pipeline_parts(ParallelConfig(pipeline=2, stage_layers=[4, 4]), 7)
