"""The log-odds displacement, its bins of confidence and its quantiles, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.objective.log_odds import (
    CONFIDENCES,
    EDGES,
    SMALLEST_REST,
    log_odds_displacement,
    log_odds_metrics,
)
from megatron_rl.observe.metrics import merge, reduce


def logs(*values: float) -> torch.Tensor:
    return torch.tensor([math.log(value) for value in values])


def figures_of(*parts: dict) -> dict[str, float]:
    return reduce(merge(parts), lambda values, _operation: values)


def test_displacement_worked_by_hand() -> None:
    # Odds of p_train: 1, 3, 1/9, 99; of p_inf: 1/3, 1, 1/4, 99.
    recomputed, rollout = logs(0.5, 0.75, 0.1, 0.99), logs(0.25, 0.5, 0.2, 0.99)
    got = log_odds_displacement(recomputed, rollout)
    assert got.dtype == torch.float64
    expected = [math.log(3), math.log(3), math.log(4 / 9), 0.0]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_shift_of_the_logit_is_the_displacement_at_every_confidence() -> None:
    logits = torch.linspace(-12, 12, 25, dtype=torch.float64)
    rollout = torch.nn.functional.logsigmoid(logits)
    recomputed = torch.nn.functional.logsigmoid(logits + 0.3)
    assert log_odds_displacement(recomputed, rollout).tolist() == pytest.approx([0.3] * 25)
    # The ratio and the difference hide it at one end each.
    difference = (recomputed.exp() - rollout.exp()).abs()
    assert difference[0] < 1e-5 and recomputed[-1] - rollout[-1] < 1e-5


def test_certain_tokens_are_told_apart_down_to_the_rounding_of_float32() -> None:
    certain, nearly = torch.tensor([0.0]), torch.tensor([-1e-3])
    assert log_odds_displacement(certain, certain).tolist() == [0.0]
    got = log_odds_displacement(certain, nearly)
    assert math.isfinite(got) and got > 0
    expected = 1e-3 - math.log(SMALLEST_REST / -math.expm1(-1e-3))
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_quantiles_by_confidence_worked_by_hand() -> None:
    # p_inf 0.6, odds 3/2: three times odds of 9/2 by the learner, so ln 3, and once 1/2, so -ln 3.
    # p_inf 0.995, where eps is 0 twice.
    recomputed = logs(9 / 11, 9 / 11, 9 / 11, 1 / 3, 0.995, 0.995)
    rollout = logs(0.6, 0.6, 0.6, 0.6, 0.995, 0.995)
    figures = figures_of(log_odds_metrics(recomputed, rollout))
    assert {name.split("/")[1] for name in figures} == {
        "log_odds_0.5_to_0.9",
        "log_odds_0.99_to_0.999",
    }
    # As exact as a bin is wide: 10^(1/8) is a third.
    low, high = math.log(3) * 10 ** (-1 / 8), math.log(3) * 10 ** (1 / 8)
    assert low <= figures["discrepancy/log_odds_0.5_to_0.9/q50"] <= high
    assert low <= figures["discrepancy/log_odds_0.5_to_0.9/q75"] <= high
    assert -high <= figures["discrepancy/log_odds_0.5_to_0.9/q1"] <= -low
    assert figures["discrepancy/log_odds_0.99_to_0.999/q50"] == 0.0
    assert abs(figures["discrepancy/log_odds_0.99_to_0.999/q99"]) <= EDGES[-len(EDGES) // 2]


def test_counts_do_not_depend_on_how_tokens_are_shared_out() -> None:
    generator = torch.Generator().manual_seed(0)
    rollout = -8 * torch.rand(400, generator=generator) ** 6
    recomputed = (rollout + 0.3 * torch.randn(400, generator=generator)).clamp(max=0.0)
    whole = figures_of(log_odds_metrics(recomputed, rollout))
    parts = [log_odds_metrics(recomputed[at::3], rollout[at::3]) for at in range(3)]
    nothing = log_odds_metrics(torch.zeros(0), torch.zeros(0))
    assert list(nothing) == [f"discrepancy/{name}" for name in CONFIDENCES]
    assert figures_of(nothing) == {}
    assert figures_of(*parts, nothing) == whole
    assert len(whole) >= 5 * (len(CONFIDENCES) - 1)
    assert all(abs(value) <= EDGES[-1] for value in whole.values())
