"""One recorded batch through a real optimizer step with every kind of objective gives one result,
however it is laid out: with rejected tokens, rejected sequences, a batch of which nothing is kept,
and a rank that holds no sampled token. What the ranks do stands in objective_ranks.py.
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
from tests.learner.support.objective_ranks import CASES, CORRECTED, OBJECTIVES, PLAIN
from tests.learner.support.step_ranks import DUAL_VALUE, Case
from tests.support.ranks import run_module


@pytest.fixture(scope="module")
def reference_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with every weight moved a little."""
    folder = tmp_path_factory.mktemp("reference") / "model"
    shutil.copytree(tiny_checkpoint, folder)
    generator = torch.Generator().manual_seed(4)
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def outcomes(
    tiny_checkpoint: Path,
    reference_checkpoint: Path,
    recorded_rollouts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Outcomes:
    out = tmp_path_factory.mktemp("objectives")
    paths = (tiny_checkpoint, reference_checkpoint, recorded_rollouts, out)
    for world_size in (1, 2):
        run_module("tests.learner.support.objective_ranks", *paths, ranks=world_size)
    return {case.name: torch.load(out / f"{case.name}.pt", weights_only=False) for case in CASES}


def one_of(name: str, **how: Any) -> str:
    """The name of an objective's case."""
    [case] = [
        case
        for case in CASES
        if case == Case(objective=name, num_mini_batches=case.num_mini_batches, **how)
    ]
    return case.name


compared = pytest.mark.parametrize(
    "case",
    [case for case in CASES if not case.is_aligned and case.name != case.reference],
    ids=lambda case: case.name,
)


@compared
def test_no_number_depends_on_the_layout(case: Case, outcomes: Outcomes) -> None:
    got, expected = outcomes[case.name], outcomes[case.reference]
    loss, reference_loss = (metrics_of(each).get("loss/mean", 0.0) for each in (got, expected))
    # A penalty in the loss can be larger than the advantages.
    scale = max(expected["shaped_advantage"], abs(reference_loss))
    assert abs(loss - reference_loss) <= LOSS_TOLERANCE * scale
    dual, reference_dual = got["reports"][0].dual_value, expected["reports"][0].dual_value
    assert reference_dual != DUAL_VALUE
    assert abs(dual - reference_dual) <= DISCREPANCY_TOLERANCE
    figures, reference_figures = metrics_of(got), metrics_of(expected)
    assert figures.keys() == reference_figures.keys()
    for name, figure in reference_figures.items():
        if not name.startswith("learner/"):
            limit = FIGURE_TOLERANCE * max(1.0, abs(figure))
            assert abs(figures[name] - figure) <= limit, name
    for report in got["reports"][1:]:  # to the last bit on every rank
        assert report == got["reports"][0]


@compared
def test_no_gradient_depends_on_the_layout(case: Case, outcomes: Outcomes) -> None:
    got, expected = outcomes[case.name], outcomes[case.reference]
    for what in ("gradients", "weights"):
        for name, tensor in expected[what].items():
            if case.objective == "all_rejected" and what == "gradients":
                assert got[what][name].norm() == tensor.norm() == 0, name
                continue
            assert tensor.norm() > 0, name
            assert relative_difference(got[what][name], tensor) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.is_swapped], ids=lambda case: case.objective
)
def test_swapping_the_ranks_changes_no_bit(case: Case, outcomes: Outcomes) -> None:
    plain = outcomes[one_of(case.objective, layout="dp2")]
    swapped = outcomes[case.name]
    assert swapped["kept"] == plain["kept"][::-1] != plain["kept"]
    assert swapped["reports"] == plain["reports"]
    for what in ("gradients", "weights"):
        for name, tensor in plain[what].items():
            assert torch.equal(swapped[what][name], tensor), name


@pytest.mark.parametrize("name", CORRECTED)
def test_equal_engines_leave_the_plain_loss_and_lambda_falls(name: str, outcomes: Outcomes) -> None:
    corrected = outcomes[one_of(name, is_aligned=True)]
    plain = outcomes[one_of(PLAIN + name, is_aligned=True)]
    for what in ("gradients", "weights"):
        for tensor_name, tensor in plain[what].items():
            assert torch.equal(corrected[what][tensor_name], tensor), tensor_name
    metrics = metrics_of(corrected)
    assert metrics["discrepancy/max"] == 0
    for key, value in metrics.items():
        if key.startswith("correction/"):
            is_one = key.rsplit("/")[1] in ("weight", "effective_sample_size")
            assert value == (is_one and not key.endswith("std")), key
        if key.startswith("score_centering/size"):
            assert value == 0, key
    constraint = OBJECTIVES[name].constraint
    fallen = constraint.initial - constraint.tolerance
    assert corrected["reports"][0].dual_value == pytest.approx(fallen, abs=1e-15)


def test_the_rules_took_some_and_left_some(outcomes: Outcomes) -> None:
    for name, keys in {
        "dapo_tis_rejection": ("rejected_tokens/mean", "outside_bounds/mean"),
        "gspo_k3": ("rejected_sequences/mean", "outside_bounds/mean"),
        "cispo_veto_token_gate": ("vetoed_sequences/mean",),
        "bypass_dppo_penalty": ("rejected_sequences/mean", "opsm_masked_sequences/mean"),
        "dr_grpo_batch_normalized": ("outside_bounds/mean",),
        "cis_squared_ratio": ("outside_bounds/mean",),
        "decoupled_opsm": ("outside_bounds/mean", "opsm_masked_sequences/mean"),
        "score_centering_opsm": ("opsm_masked_sequences/mean",),
        "score_centering_rejection": ("outside_bounds/mean", "rejected_sequences/mean"),
    }.items():
        metrics = metrics_of(outcomes[one_of(name)])
        for key in keys:
            assert 0.02 < metrics[f"correction/{key}"] < 0.98, (name, key)


def test_the_cap_acts_and_the_signal_is_what_moves_lambda(outcomes: Outcomes) -> None:
    metrics = metrics_of(outcomes[one_of("bypass_capped_squared_log_ratio")])
    assert 0.02 < metrics["loss/clip_fraction_cap/mean"] < 0.98
    for name in ("cis_squared_ratio", "bypass_capped_squared_log_ratio"):
        report = outcomes[one_of(name)]["reports"][0]
        signal = report.metrics["constraint/signal/mean"]
        assert signal > 10 * report.metrics["discrepancy/mean"] > 0
        assert report.dual_value == pytest.approx(DUAL_VALUE + signal - 0.01, abs=1e-12)
        assert report.metrics["constraint/signal/tolerance"] == 0.01
        assert "constraint/tolerance" not in report.metrics


def test_rejection_changes_neither_the_gap_nor_lambda(outcomes: Outcomes) -> None:
    """Not even where everything is rejected: lambda steps by every token that was sampled."""
    names = ("dapo_tis_rejection", "kl_in_loss", "all_rejected")
    reports = [outcomes[one_of(name)]["reports"][0] for name in names]
    assert len({report.metrics["discrepancy/mean"] for report in reports}) == 1
    assert len({report.dual_value for report in reports}) == 1
    assert reports[-1].metrics["correction/rejected_tokens/mean"] > 0.99
    assert "loss/mean" not in reports[-1].metrics


def test_the_gate_of_the_mean_opens_above_the_tolerance_only(outcomes: Outcomes) -> None:
    for name, is_open in (("gspo_k3", True), ("dr_grpo_batch_normalized", False)):
        for layout in ("dp1", "dp2", "pp2"):
            how = {"layout": layout} | ({"tokens_per_row": 48} if layout == "pp2" else {})
            metrics = metrics_of(outcomes[one_of(name, **how)])
            constraint = OBJECTIVES[name].constraint
            assert (metrics["discrepancy/mean"] > constraint.tolerance) == is_open
            assert (metrics["constraint/penalty/mean"] > 0) == is_open
            assert metrics["constraint/lambda"] == DUAL_VALUE


def test_batch_normalised_weights_have_a_mean_of_one(outcomes: Outcomes) -> None:
    """Of the sequences; the tokens of a long one see its weight more often."""
    metrics = metrics_of(outcomes[one_of("dr_grpo_batch_normalized", layout="dp2")])
    assert abs(metrics["correction/weight/mean"] - 1) < 0.2
    assert metrics["correction/weight/max"] != 1.5


def test_heads_are_part_of_the_engines_distribution(outcomes: Outcomes) -> None:
    """Six of 98 tokens, every other one of them the sampled one; centering changes the loss."""
    for name in ("score_centering_opsm", "score_centering_rejection"):
        metrics = metrics_of(outcomes[one_of(name)])
        assert 0.02 < metrics["score_centering/head_mass/mean"] < 0.5
        assert metrics["score_centering/size/mean"] > 1e-3
    assert "score_centering/size/mean" not in metrics_of(outcomes[one_of("all_rejected")])


def test_the_reference_is_another_policy(outcomes: Outcomes) -> None:
    for name in ("kl_in_loss", "kl_in_advantages"):
        assert metrics_of(outcomes[one_of(name)])["reference/kl_k3/mean"] > 0.01


def test_every_objective_has_its_own_gradient(outcomes: Outcomes) -> None:
    norms = [
        sum(float(each.norm()) for each in outcomes[one_of(name)]["gradients"].values())
        for name in OBJECTIVES
    ]
    assert len({round(norm, 6) for norm in norms}) == len(norms)
