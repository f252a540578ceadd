"""The rows that a pipeline rank has in flight, counted by hand."""

from __future__ import annotations

import pytest

from megatron_rl.config import Config, ParallelConfig
from megatron_rl.plan.layout import layout_of
from tests.plan.shapes import layout


@pytest.mark.parametrize(
    ("stage", "num_rows", "expected"), [(0, 9, 4), (3, 9, 1), (1, 9, 3), (0, 2, 2)]
)
def test_a_stage_forwards_rows_until_the_first_comes_back(
    stage: int, num_rows: int, expected: int
) -> None:
    assert layout(pipeline=4).rows_in_flight(stage, num_rows) == expected


def test_a_virtual_pipeline_counts_in_parts() -> None:
    # Rank 0 of 2 with 2 parts: 2 rows ahead of the other rank, 2 of the first part, and one more.
    virtual = layout(pipeline=2, virtual_pipeline=2)
    assert virtual.rows_in_flight(0, 8) == 5 / 2
    assert virtual.rows_in_flight(1, 8) == 3 / 2
    assert virtual.rows_in_flight(0, 1) == 1


def test_what_is_left_of_the_gpus_is_data_parallel() -> None:
    config = Config(parallel=ParallelConfig(tensor=4, pipeline=2))
    found = layout_of(config, num_nodes=4, gpus_per_node=8)
    assert (found.data, found.world_size, found.num_optimizer_shards) == (4, 32, 1)
    assert layout(data=4, context=2, has_distributed_optimizer=True).num_optimizer_shards == 8
