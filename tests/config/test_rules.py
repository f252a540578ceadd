"""Rules between sections: what waits for freshly published weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_rl.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LearnerConfig,
    LoopConfig,
    ParallelConfig,
    SyncConfig,
)
from megatron_rl.errors import ConfigError


def test_what_needs_fresh_engines_falls_on_a_published_step() -> None:
    config = Config(
        sync=SyncConfig(every=4),
        checkpoint=CheckpointConfig(every=8),
        eval=EvalConfig(every=0),
        loop=LoopConfig(num_steps=12),
    )
    for section, key, value in (
        ("checkpoint", "every", 6),
        ("eval", "every", 2),
        ("loop", "num_steps", 10),
    ):
        changed = replace(getattr(config, section), **{key: value})
        expected = rf"{section}\.{key}: expected a multiple of sync\.every=4, .*got {value}"
        with pytest.raises(ConfigError, match=expected):
            replace(config, **{section: changed})
    with pytest.raises(ConfigError, match="every: expected at least 1"):
        SyncConfig(every=0)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"sequence_parallel": True}, "sequence_parallel: expected false with tensor=1"),
        ({"virtual_pipeline": 2}, "virtual_pipeline: expected 1 with pipeline=1"),
        ({"pipeline": 2, "stage_layers": [1]}, r"stage_layers: expected 2 numbers"),
        ({"pipeline": 2, "stage_layers": [4, 0]}, "stage_layers: expected at least 1 layer"),
    ],
)
def test_layouts_that_contradict_themselves(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**layout)


def test_ranks_that_share_a_row_get_equal_parts() -> None:
    layout = ParallelConfig(tensor=3, sequence_parallel=True)
    assert (layout.row_multiple, ParallelConfig(tensor=3).row_multiple) == (3, 1)
    Config(parallel=layout, learner=LearnerConfig(tokens_per_micro_batch=4098))
    with pytest.raises(ConfigError, match="tokens_per_micro_batch: expected a multiple of 3"):
        Config(parallel=layout)
