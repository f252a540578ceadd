"""A real engine in float32 serves the weights of a learner in every layout: after a publication,
and after an update and another one. What the ranks do stands in layout_ranks.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_rl.config import RolloutConfig, SamplingConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.server import start_engines
from megatron_rl.records import TOKEN_VARIABLE
from megatron_rl.sync.probe import FLOAT32_BOUND
from tests.support.layouts import EXPERT_LAYOUTS, LAYOUTS
from tests.support.models import write_tiny_experts
from tests.support.ranks import run_module
from tests.sync.layout_ranks import NUM_SAMPLES, NUM_TOKENS
from tests.sync.served import NUM_LAYERS, UPDATE_TIMEOUT

# One of every kind of division; all of them, and their combinations, are slow.
FEW = ("tp2_sp", "cp2", "pp2_vpp2", "pp2_uneven", "tp4")

Publications = list[dict[str, float]]


def run(
    layouts: Sequence[str], model: Path, address: EngineAddress, out: Path
) -> dict[str, Publications]:
    """What rank 0 found, by layout. The learner starts from other weights than the engine."""
    known = LAYOUTS | EXPERT_LAYOUTS
    for ranks in sorted({known[name].ranks for name in layouts}):
        own = [name for name in layouts if known[name].ranks == ranks]
        run_module(
            "tests.sync.layout_ranks",
            model,
            address.url,
            out,
            *own,
            ranks=ranks,
            variables={TOKEN_VARIABLE: address.token},
        )
    return {name: json.loads((out / f"{name}.json").read_text()) for name in layouts}


def check(publications: Publications) -> None:
    first, second = publications
    for publication in publications:
        assert publication["num_tokens"] == NUM_SAMPLES * NUM_TOKENS
        assert publication["gap"] <= FLOAT32_BOUND
    # The update was one: the engine's own samples became likelier.
    assert second["mean_logprob"] > first["mean_logprob"] + 0.05


@pytest.fixture(scope="module")
def found(
    folders: list[Path], address: EngineAddress, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Publications]:
    return run(FEW, folders[1], address, tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("layout", FEW)
def test_the_engine_serves_what_was_published_twice_in_a_row(
    layout: str, found: dict[str, Publications]
) -> None:
    check(found[layout])


@pytest.mark.slow
def test_it_does_so_in_every_layout(
    folders: list[Path], address: EngineAddress, tmp_path: Path
) -> None:
    others = [name for name in LAYOUTS if name not in FEW]
    for publications in run(others, folders[1], address, tmp_path).values():
        check(publications)


@pytest.mark.slow
def test_a_mixture_of_experts_is_served_from_every_layout(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_tiny_experts(model, expert_width=64, layers=NUM_LAYERS)
    (engine,) = start_engines(
        RolloutConfig(
            dtype="float32",
            max_num_seqs=32,
            kv_cache_gib=0.25,
            max_model_len=256,
            sampling=SamplingConfig(max_tokens=64),
        ),
        model_path=str(model),
        log_dir=tmp_path,
        token="a-token-for-this-test",
        seed=0,
        update_timeout_seconds=UPDATE_TIMEOUT,
    )
    with engine:
        engine.wait_ready()
        found = run(tuple(EXPERT_LAYOUTS), model, engine.address, tmp_path)
    for layout, publications in found.items():
        gaps = [f"{publication['gap']:.2e}" for publication in publications]
        print(f"{layout}: {gaps}")
        check(publications)
