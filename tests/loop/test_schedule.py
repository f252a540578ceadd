"""Which steps publish, evaluate and save, counted by hand."""

from __future__ import annotations

import pytest

from megatron_rl.config import CheckpointConfig, Config, EvalConfig, LoopConfig, SyncConfig
from megatron_rl.loop.schedule import (
    should_evaluate,
    should_publish,
    should_save,
    should_save_hf,
)


def steps_of(predicate, config: Config) -> list[int]:
    return [step for step in range(1, config.loop.num_steps + 1) if predicate(config, step)]


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4]), (2, [2, 4])])
def test_publications(every: int, expected: list[int]) -> None:
    config = Config(
        loop=LoopConfig(num_steps=4),
        sync=SyncConfig(every=every),
        checkpoint=CheckpointConfig(every=0),
    )
    assert steps_of(should_publish, config) == expected


@pytest.mark.parametrize(
    ("every", "at_end", "expected"),
    [(0, True, [4]), (0, False, []), (2, True, [2, 4]), (3, True, [3, 4]), (3, False, [3])],
)
def test_evaluations(every: int, at_end: bool, expected: list[int]) -> None:
    config = Config(loop=LoopConfig(num_steps=4), eval=EvalConfig(every=every, at_end=at_end))
    assert steps_of(should_evaluate, config) == expected


@pytest.mark.parametrize(("every", "expected"), [(0, [4]), (2, [2, 4]), (3, [3, 4])])
def test_checkpoints(every: int, expected: list[int]) -> None:
    config = Config(loop=LoopConfig(num_steps=4), checkpoint=CheckpointConfig(every=every))
    assert steps_of(should_save, config) == expected


@pytest.mark.parametrize(("every", "expected"), [(0, []), (2, [2, 4]), (3, [3])])
def test_hugging_face_checkpoints(every: int, expected: list[int]) -> None:
    config = Config(loop=LoopConfig(num_steps=4), checkpoint=CheckpointConfig(hf_every=every))
    assert steps_of(should_save_hf, config) == expected
