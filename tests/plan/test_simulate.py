"""Full-size models as every rank in turn; and what is told of a sync that is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import ParallelConfig
from megatron_rl.learner.layout.simulated import Exchange
from megatron_rl.plan.parameters import stage_parameters, tensor_shapes
from megatron_rl.plan.simulate import SimulatedRank, problems_in
from megatron_rl.weights.geometry import read_geometry
from tests.plan.shapes import SHAPES
from tests.plan.support.simulated_worlds import LARGE_WORLDS, WORLDS
from tests.support.geometry import SMALL
from tests.support.ranks import run_module


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("worlds")
    run_module("tests.plan.support.simulated_worlds", SHAPES, out, ranks=0)
    return json.loads((out / "worlds.json").read_text())


@pytest.mark.parametrize("model", WORLDS)
def test_every_tensor_of_a_full_size_model_is_sent_once(model: str, worlds: dict[str, Any]) -> None:
    assert_sent_once(model, *WORLDS[model], worlds[model])


@pytest.mark.slow
def test_every_tensor_of_thousands_of_experts_is_sent_once(tmp_path: Path) -> None:
    paths = (SHAPES, tmp_path, "large")
    run_module("tests.plan.support.simulated_worlds", *paths, ranks=0, timeout=1200)
    found = json.loads((tmp_path / "worlds.json").read_text())
    for model, (parallel, size) in LARGE_WORLDS.items():
        assert_sent_once(model, parallel, size, found[model])


def assert_sent_once(
    model: str, parallel: ParallelConfig, size: int, found: dict[str, Any]
) -> None:
    geometry = read_geometry(SHAPES / model)
    assert found["problems"] == []
    assert len(found["num_parameters"]) == size
    assert sum(found["num_sent"]) == len(tensor_shapes(geometry))
    # Ranks are numbered tensor first, then data, then pipeline.
    for rank, count in enumerate(found["num_parameters"]):
        assert count == stage_parameters(geometry, parallel, rank // (size // parallel.pipeline))


def _rank(rank: int, sent: Any, exchanges: Any = ()) -> SimulatedRank:
    return SimulatedRank(
        rank=rank, num_parameters=1, syncs=(tuple(sent),) * 2, exchanges=(tuple(exchanges),) * 2
    )


def test_sound_syncs_of_two_ranks_that_share_the_tensors() -> None:
    tensors = tensor_shapes(SMALL)
    assert problems_in([_rank(0, tensors[:5]), _rank(1, tensors[5:])], SMALL) == []


def test_tensors_that_are_missing_sent_twice_unknown_or_out_of_order() -> None:
    tensors = tensor_shapes(SMALL)
    name = tensors[3][0]
    for sent, words in (
        ([_rank(0, tensors[:3] + tensors[4:])], f"expected {name} .* once, got it 0 times"),
        ([_rank(0, tensors), _rank(1, tensors[3:4])], f"expected {name} .* once, got it 2 times"),
        ([_rank(0, [*tensors, ("x", (1,))])], r"got x \[1\], not a tensor"),
        ([_rank(0, tensors[::-1])], "rank 0 sends in another order than the model's"),
    ):
        problems = problems_in(sent, SMALL)
        assert len(problems) == 2  # one for each sync
        assert re.search(words, problems[0]), problems[0]


def test_another_order_in_the_second_sync() -> None:
    tensors = tuple(tensor_shapes(SMALL))
    first, second = _rank(0, tensors[:2]), _rank(1, tensors[2:])
    later = replace(first, syncs=(first.syncs[0], ()))
    other = replace(second, syncs=(second.syncs[0], tensors))
    found = problems_in([later, other], SMALL)
    assert found == [
        f"rank {rank}: expected the same order in every sync, got another" for rank in (0, 1)
    ]


def test_a_rank_that_would_wait_for_ever() -> None:
    sent = Exchange(kind="pair", ranks=(1, 0), shape=(8,))
    tensors = tensor_shapes(SMALL)
    assert problems_in([_rank(0, tensors, [sent]), _rank(1, (), [sent])], SMALL) == []
    [problem, _] = problems_in([_rank(0, tensors, [sent]), _rank(1, ())], SMALL)
    assert problem.endswith("the same pair calls on all of their ranks, got rank 1: 0, rank 0: 1")
    other = replace(sent, shape=(4,))
    assert problems_in([_rank(0, tensors, [sent]), _rank(1, (), [other])], SMALL)
