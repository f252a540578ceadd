"""Mini-batches of which no rank keeps a token take no optimizer step, in every layout; and every
preset, on a batch of rejected, empty, failed and masked responses, gives on two ranks, of which one
keeps no token, what it gives on one. What the ranks do stands in edge_ranks.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_rl.config.presets import PRESETS
from tests.learner.support.breaking import BROKEN
from tests.learner.support.comparison import (
    FIGURE_TOLERANCE,
    GRADIENT_TOLERANCE,
    relative_difference,
)
from tests.learner.support.edge_batch import NUM_LEFT_OUT
from tests.learner.support.edge_ranks import SKIPPED

NAMES = [layout + kind for layout in SKIPPED for kind in ("", ".distributed")]
KINDS = ("masked", "rejected", "rejected, constant", "left out")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_where_no_rank_keeps_a_token_nothing_moves(
    name: str, kind: str, edge_outcomes: dict[str, list[Any]]
) -> None:
    for of_rank in edge_outcomes[name]:
        assert of_rank["begins_equal"]
        found = of_rank["kinds"][kind]
        assert found["is_untouched"]  # weights, moments, the optimizer's count and the schedule
        assert found["has_dual_step"]
        assert found["metrics"]["learner/num_skipped_updates"] == 1
        assert "learner/grad_norm" not in found["metrics"]
        assert found["metrics"] == edge_outcomes[name][0]["kinds"][kind]["metrics"]


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_not_finite_changes_nothing_on_any_rank(
    name: str, kind: str, edge_outcomes: dict[str, list[Any]]
) -> None:
    expected = edge_outcomes[name][0]["broken"][kind]
    assert expected["problem"]
    for of_rank in edge_outcomes[name]:
        found = of_rank["broken"][kind]
        assert found["is_untouched"]  # weights, moments, the optimizer's count and the schedule
        assert not found["has_dual_step"]
        assert (found["problem"], found["metrics"]) == (expected["problem"], expected["metrics"])
        num_broken = 0 if kind == "dropped sample" else 1
        assert found["metrics"]["learner/num_broken_updates"] == num_broken
        assert all(math.isfinite(value) for value in found["metrics"].values())


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_not_finite_is_told_on_every_rank(
    name: str, edge_outcomes: dict[str, list[Any]]
) -> None:
    told = f"rank {len(edge_outcomes[name]) - 1}: expected finite weights, got "
    for of_rank in edge_outcomes[name]:
        sound, *broken = of_rank["weights"]
        assert sound == ""
        for found, value in zip(broken, ("nan in ", "inf in "), strict=True):
            assert found.startswith(told + value)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_what_its_mini_batches_with_tokens_make_of_it(
    name: str, edge_outcomes: dict[str, list[Any]]
) -> None:
    for of_rank in edge_outcomes[name]:
        mixed = of_rank["mixed"]
        assert mixed["is_equal"] and mixed["has_moved"]
        metrics, expected = mixed["metrics"], mixed["of_other"]
        assert metrics["learner/num_skipped_updates"] == 1
        assert expected["learner/num_skipped_updates"] == 0
        for key in ("learner/grad_norm", "learner/learning_rate", "loss/mean"):
            assert metrics[key] == expected[key]
        assert mixed["dual"][0] == mixed["dual"][1]


@pytest.mark.parametrize("name", NAMES)
def test_a_bounded_penalty_is_0_where_every_advantage_is(
    name: str, edge_outcomes: dict[str, list[Any]]
) -> None:
    for of_rank in edge_outcomes[name]:
        found = of_rank["without advantages"]
        assert found["is_equal"] and not found["is_equal_without_bound"]
        assert found["metrics"]["constraint/lambda"] == found["dual"] == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_beside_a_rank_without_a_kept_token(
    preset: str, edge_outcomes: dict[str, list[Any]]
) -> None:
    [alone] = (of_rank[preset] for of_rank in edge_outcomes["presets.dp1"])
    first, second = (of_rank[preset] for of_rank in edge_outcomes["presets.dp2"])
    assert first["num_tokens"] == [0, 0]
    assert second["num_tokens"] == alone["num_tokens"] and second["num_tokens"][0] > 0
    assert first["report"] == second["report"]
    assert alone["num_left_out"] == NUM_LEFT_OUT
    of_ranks = (first["num_left_out"], second["num_left_out"])
    assert tuple(map(sum, zip(*of_ranks, strict=True))) == NUM_LEFT_OUT
    metrics, expected = first["report"].metrics, alone["report"].metrics
    assert metrics.keys() == expected.keys()
    assert metrics["learner/num_skipped_updates"] == 1
    assert metrics["learner/grad_norm"] > 0
    for key, value in metrics.items():
        assert math.isfinite(value), key
        limit = FIGURE_TOLERANCE * max(1.0, abs(expected[key]))
        assert abs(value - expected[key]) <= limit, key
    for key, tensor in alone["weights"].items():
        assert relative_difference(first["weights"][key], tensor) <= GRADIENT_TOLERANCE, key
