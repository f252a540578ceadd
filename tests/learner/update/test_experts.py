"""A training step of a mixture of experts: one result in every layout, with the losses that balance
the experts and with routing replay. What the ranks do is in expert_ranks.py and expert_single.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.learner.support.comparison import (
    DISCREPANCY_TOLERANCE,
    FIGURE_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Outcomes,
    metrics_of,
    relative_difference,
)
from tests.learner.support.expert_ranks import ALL, LAYOUTS, SOME, cases_of
from tests.learner.support.step_ranks import DUAL_VALUE, Case
from tests.support.models import write_tiny_experts
from tests.support.ranks import run_module

# Squared ratios of whole sequences amplify the rounding of log-probs, which is a little more than
# that of a dense model.
EXPERT_FIGURE_TOLERANCE = 4 * FIGURE_TOLERANCE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "model"
    write_tiny_experts(folder)
    return folder


@pytest.fixture(scope="module")
def rollouts(model: Path) -> Path:
    folder = model.parent / "rollouts"
    run_module("tests.learner.recorded", model, folder, ranks=0)
    return folder


def reference_of(model: Path) -> Path:
    """Another mixture, with a router and experts of its own."""
    folder = model.parent / "reference"
    if not folder.exists():
        shutil.copytree(model, folder)
        tensors = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(5)
        for tensor in tensors.values():
            tensor.mul_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(model: Path, rollouts: Path, out: Path, names: tuple[str, ...], *more: str) -> Outcomes:
    for world_size in (1, 2):
        paths = (model, reference_of(model), rollouts, out)
        run_module("tests.learner.support.expert_ranks", *paths, *more, ranks=world_size)
    cases = cases_of(names)
    return {case.name: torch.load(out / f"{case.name}.pt", weights_only=False) for case in cases}


@pytest.fixture(scope="module")
def outcomes(model: Path, rollouts: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run(model, rollouts, tmp_path_factory.mktemp("steps"), SOME)


@pytest.fixture(scope="module")
def single(model: Path, rollouts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("single")
    run_module("tests.learner.support.expert_single", model, rollouts, out, ranks=1)
    return torch.load(out / "single.pt", weights_only=False)


def compared(names: tuple[str, ...]) -> list[Case]:
    return [case for case in cases_of(names) if case.name != case.reference]


def assert_same_step(case: Case, outcomes: Outcomes) -> None:
    """Loss, lambda, metrics, gradients and weights are those of one rank."""
    got, expected = outcomes[case.name], outcomes[case.reference]
    figures, reference_figures = metrics_of(got), metrics_of(expected)
    loss, reference_loss = (each.get("loss/mean", 0.0) for each in (figures, reference_figures))
    scale = max(expected["shaped_advantage"], abs(reference_loss))
    assert abs(loss - reference_loss) <= LOSS_TOLERANCE * scale
    dual, reference_dual = got["reports"][0].dual_value, expected["reports"][0].dual_value
    assert reference_dual != DUAL_VALUE
    assert abs(dual - reference_dual) <= DISCREPANCY_TOLERANCE
    assert figures.keys() == reference_figures.keys()
    for name, figure in reference_figures.items():
        if not name.startswith("learner/"):
            limit = EXPERT_FIGURE_TOLERANCE * max(1.0, abs(figure))
            assert abs(figures[name] - figure) <= limit, name
    assert all(report == got["reports"][0] for report in got["reports"])
    for what in ("gradients", "weights"):
        for name, tensor in expected[what].items():
            assert tensor.norm() > 0, name
            assert relative_difference(got[what][name], tensor) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("case", compared(SOME), ids=lambda case: case.name)
def test_a_step_does_not_depend_on_the_layout(case: Case, outcomes: Outcomes) -> None:
    assert_same_step(case, outcomes)


@pytest.mark.slow
def test_no_objective_depends_on_the_layout(model: Path, rollouts: Path, tmp_path: Path) -> None:
    others = tuple(name for name in ALL if name != "all_rejected")
    found = run(model, rollouts, tmp_path, others, "all")
    for case in compared(others):
        assert_same_step(case, found)


def test_routers_report_every_token_once(outcomes: Outcomes) -> None:
    for how in LAYOUTS:
        case = Case(objective="gspo_k3", **how)
        metrics = metrics_of(outcomes[case.name])
        assert metrics["router/dropped/mean"] == 0.0
        assert 0.0 <= metrics["router/load/min"] < 0.25 < metrics["router/load/max"] <= 0.5
        assert metrics["router/load_balancing_loss/mean"] > 1.0
        assert metrics["router/margin/mean"] > 0.0


def test_neither_padding_nor_filler_reaches_a_router(single: dict[str, Any]) -> None:
    assert single["num_positions"] > single["num_tokens"]
    metrics = single["metrics"]
    assert metrics["router/dropped/mean"] == 0.0
    assert single["with_filler"] == pytest.approx(metrics, rel=1e-12)
    assert single["nothing"] == {}


@pytest.mark.parametrize("which", ["load_balancing", "z_loss"])
def test_the_gradient_of_a_loss_is_its_slope(which: str, single: dict[str, Any]) -> None:
    """With the factor that makes up for Megatron's division by the counts."""
    found = single["derivatives"][which]
    assert found["gradient"] > 1e-3
    assert found["differences"] == pytest.approx(found["gradient"], rel=0.01)


@pytest.mark.parametrize("recomputation", ["none", "full", "selective"])
def test_replayed_routes_give_the_same_bits(recomputation: str, single: dict[str, Any]) -> None:
    found = single["replays"][recomputation]
    for name, tensor in found["free"].items():
        assert torch.equal(found["replayed"][name], tensor), name
        assert torch.equal(found["unknown"][name], tensor), name
        assert torch.equal(single["replays"]["none"]["replayed"][name], tensor), name
    changed = [name for name, tensor in found["free"].items() if "experts" in name]
    assert changed
    for name in changed:
        assert relative_difference(found["other"][name], found["free"][name]) > 0.01, name


@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_the_experts_of_an_engine_are_followed(recomputation: str, single: dict[str, Any]) -> None:
    """The last token of a sequence, which the engine only sampled, is routed freely."""
    found = single["rollouts"][recomputation]
    for name, tensor in found["free"].items():
        assert torch.equal(found["own"][name], tensor), name
        assert torch.equal(single["rollouts"]["none"]["own"][name], tensor), name
        if "experts" in name:
            assert relative_difference(found["other"][name], tensor) > 0.01, name


def test_recomputed_logprobs_follow_the_engine_too(single: dict[str, Any]) -> None:
    free, own, other = single["rollouts"]["logprobs"]
    assert all(torch.equal(one, another) for one, another in zip(free, own, strict=True))
    assert not any(torch.equal(one, another) for one, another in zip(free, other, strict=True))
