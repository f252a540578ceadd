"""One recorded batch through a real optimizer step gives one result, however it is laid out: DP,
TP, PP, row length, packed or not, with a rank that holds no kept token.

The batch has random tokens, mixed lengths, a group of equal rewards, and sequences of which nothing
is kept; see recorded.py. What the ranks do stands in step_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.objective.advantage import group_advantages
from megatron_rl.rollout.recording import read_step
from tests.learner.recorded import SPARSE_STEP
from tests.learner.support.comparison import (
    DISCREPANCY_TOLERANCE,
    FIGURE_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Outcomes,
    metrics_of,
    relative_difference,
)
from tests.learner.support.step_ranks import CASES, DUAL_VALUE, TOLERANCE, Case
from tests.support.ranks import run_module


@pytest.fixture(scope="module")
def outcomes(
    tiny_checkpoint: Path, recorded_rollouts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    """What every case gave, by its name."""
    out = tmp_path_factory.mktemp("steps")
    for world_size in (1, 2):
        run_module(
            "tests.learner.support.step_ranks",
            tiny_checkpoint,
            recorded_rollouts,
            out,
            ranks=world_size,
        )
    return {case.name: torch.load(out / f"{case.name}.pt", weights_only=False) for case in CASES}


compared = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name != case.reference], ids=lambda case: case.name
)


@compared
def test_loss_discrepancy_and_lambda_do_not_depend_on_the_layout(
    case: Case, outcomes: Outcomes
) -> None:
    got, expected = outcomes[case.name], outcomes[case.reference]
    scale = expected["shaped_advantage"]
    assert scale > 0.1
    loss, reference_loss = metrics_of(got)["loss/mean"], metrics_of(expected)["loss/mean"]
    assert abs(loss - reference_loss) <= LOSS_TOLERANCE * scale
    delta = metrics_of(expected)["discrepancy/mean"]
    assert delta > 1e-5  # else nothing is compared below
    assert abs(metrics_of(got)["discrepancy/mean"] - delta) <= DISCREPANCY_TOLERANCE
    dual, reference_dual = got["reports"][0].dual_value, expected["reports"][0].dual_value
    assert reference_dual != DUAL_VALUE
    assert abs(dual - reference_dual) <= DISCREPANCY_TOLERANCE


@compared
def test_no_figure_of_the_gap_depends_on_the_layout(case: Case, outcomes: Outcomes) -> None:
    """The model's own log-probs differ by float32 rounding; a ratio's square of 1e3 shows it."""
    expected = metrics_of(outcomes[case.reference])
    figures = {name for name in expected if name.startswith("discrepancy/")}
    assert len(figures) > 40
    got = metrics_of(outcomes[case.name])
    assert {name for name in got if name.startswith("discrepancy/")} == figures
    for name in figures:
        limit = FIGURE_TOLERANCE * max(1.0, abs(expected[name]))
        assert abs(got[name] - expected[name]) <= limit, name


@compared
def test_gradients_and_weights_do_not_depend_on_the_layout(case: Case, outcomes: Outcomes) -> None:
    got, expected = outcomes[case.name], outcomes[case.reference]
    for what in ("gradients", "weights"):
        if got[what] is None:
            continue
        assert got[what].keys() == expected[what].keys()
        for name, tensor in expected[what].items():
            assert tensor.norm() > 0, name
            assert relative_difference(got[what][name], tensor) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rank_reports_the_same_numbers(case: Case, outcomes: Outcomes) -> None:
    reports = outcomes[case.name]["reports"]
    for report in reports[1:]:  # lambda too, on every pipeline stage, and to the last bit
        assert report == reports[0]
    num_rows = outcomes[case.name]["num_rows"]
    assert all(each == num_rows[0] for each in num_rows)


def test_lambda_steps_by_the_mean_discrepancy(outcomes: Outcomes) -> None:
    for outcome in outcomes.values():
        metrics = metrics_of(outcome)
        assert metrics["constraint/lambda"] == DUAL_VALUE
        stepped = DUAL_VALUE + (metrics["discrepancy/mean"] - TOLERANCE)
        assert outcome["reports"][0].dual_value == pytest.approx(stepped, abs=1e-12)
        assert metrics["constraint/next_lambda"] == outcome["reports"][0].dual_value
        # To the last bit: the sum that lambda steps on is the one that the metric is made of.
        assert outcome["reports"][0].dual_value == stepped


@pytest.mark.parametrize("layout", ["dp1", "dp2", "tp2", "pp2"])
def test_a_pass_of_its_own_for_recomputed_logprobs_changes_no_bit(
    layout: str, outcomes: Outcomes
) -> None:
    saved = outcomes[Case(layout=layout).name]
    separate = outcomes[Case(layout=layout, should_recompute=True).name]
    assert separate["reports"] == saved["reports"]
    for what in ("gradients", "weights"):
        for name, tensor in saved[what].items():
            assert torch.equal(separate[what][name], tensor), name


def test_a_rank_without_kept_tokens_takes_part(outcomes: Outcomes) -> None:
    kept = outcomes[Case(layout="dp2", is_sparse=True).name]["kept"]
    assert kept[0] == [0]
    assert kept[1][0] > 0


def test_row_lengths_and_packing_were_really_different(outcomes: Outcomes) -> None:
    num_rows = {
        name: outcomes[case.name]["num_rows"][0][0]
        for name, case in (
            ("long", Case()),
            ("short", Case(tokens_per_row=48)),
            ("one per row", Case(is_packed=False, tokens_per_row=64)),
        )
    }
    assert num_rows["long"] < num_rows["short"] < num_rows["one per row"] == 16


def test_loss_and_discrepancy_by_definition(outcomes: Outcomes, recorded_rollouts: Path) -> None:
    """One optimizer step: the ratio is 1, so the loss is minus the mean shaped advantage."""
    recorded = read_step(recorded_rollouts, SPARSE_STEP)
    groups, scores = [each.group for each in recorded], [each.scores for each in recorded]
    outcome = outcomes[Case(is_sparse=True).name]
    metrics = metrics_of(outcome)
    kept = [rollout.num_response_tokens for rollout in groups[1].rollouts]
    rewards = torch.tensor([score.reward for score in scores[1]])
    advantages = group_advantages(rewards).tolist()
    mean_advantage = sum(a * n for a, n in zip(advantages, kept)) / sum(kept)
    expected = -(mean_advantage - DUAL_VALUE * metrics["discrepancy/mean"])
    assert metrics["loss/mean"] == pytest.approx(expected, abs=1e-6)


def test_a_batch_without_a_kept_token_is_told(single_rank: dict[str, Any]) -> None:
    assert "expected a finite mean discrepancy, got nan" in single_rank["empty"]
    assert "no response token at all" in single_rank["empty"]
