"""Whether an update reached an engine, from log-probs made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.sync.change import ChangeReport, Scores, compare_changes

LEARNER = torch.tensor([-1.0, -2.0], dtype=torch.float64)
NUM_SEQUENCES = 8


def report(
    learner_change: list[float],
    engine_change: list[float],
    *,
    gap: float = 0.0,
    has_new_bytes: bool = True,
    is_exact_learner: bool = True,
) -> ChangeReport:
    """Of eight sequences of two tokens; a change is that of a sequence's tokens."""
    before = [Scores(learner=LEARNER, engine=LEARNER + gap)] * len(learner_change)
    after = [
        Scores(learner=LEARNER + x, engine=LEARNER + gap + y)
        for x, y in zip(learner_change, engine_change, strict=True)
    ]
    return compare_changes(
        before, after, has_new_bytes=has_new_bytes, is_exact_learner=is_exact_learner
    )


def test_worked_by_hand() -> None:
    """Sums of squares by sequence: x 0.02, 0.08 and y 0.02, 0.02. R = 0.04 / 0.10; the residuals
    are 0.02 - 0.008 and 0.02 - 0.032; se^2 = 2/1 * 2 * 0.012^2 / 0.10^2.
    """
    found = report([0.1, -0.2], [0.1, 0.1])
    assert (found.num_sequences, found.num_tokens) == (2, 4)
    assert found.ratio == pytest.approx(0.4)
    assert found.standard_error == pytest.approx(0.24)
    assert found.learner_change == pytest.approx(math.sqrt(0.10 / 4))
    assert found.engine_change == pytest.approx(math.sqrt(0.04 / 4))
    assert found.is_telling and not found.is_stale


X = [0.1, -0.2, 0.05, 0.1, -0.1, 0.2, 0.1, -0.05]
NOISE = [0.2, 0.1, -0.3, -0.1, 0.2, -0.2, 0.3, 0.1]  # of an INT4 engine, twice the change


@pytest.mark.parametrize(
    ("change", "is_stale"),
    [
        (X, False),
        ([x + e for x, e in zip(X, NOISE, strict=True)], False),
        ([x - e for x, e in zip(X, NOISE, strict=True)], False),
        ([0.6 * x for x in X], False),  # some of its layers changed
        ([0.0] * 8, True),
        ([0.1 * e for e in NOISE], True),  # what a repeated request changes
    ],
)
@pytest.mark.parametrize("gap", [0.0, 0.4])
def test_an_engine_that_did_not_change_is_stale(
    change: list[float], is_stale: bool, gap: float
) -> None:
    """Also where the gap between the two sides is far larger than the change."""
    found = report(X, change, gap=gap)
    assert found.is_stale == is_stale
    if is_stale:
        assert "serves the weights of an earlier update" in found.complaint()


def test_what_says_nothing_is_no_finding() -> None:
    nothing = [0.0] * NUM_SEQUENCES
    assert not report(X, nothing, has_new_bytes=False).is_stale
    assert not report(nothing, nothing).is_stale  # a learning rate of 0
    assert not report([1e-5 * x for x in X], nothing).is_stale  # the rounding of float32
    assert report([1e-2 * x for x in X], nothing).is_stale
    assert not report(X[:1], nothing[:1]).is_stale  # of one sequence there is no standard error


def test_one_sequence_that_did_not_change_among_others_is_by_chance() -> None:
    """R = 0.2: below 1/4, and not certainly."""
    found = report([0.1, 0.1, 0.1, 0.3], [0.1, 0.1, 0.05, 0.0])
    assert found.ratio == pytest.approx(0.0225 / 0.12) and not found.is_stale


def test_the_rounding_of_a_learner_in_lower_precision_is_no_change() -> None:
    """Its change must be twice the gap, or the engine's log-probs the same bits."""
    little = [0.01 * x for x in X]
    for gap, is_telling in ((0.05, True), (0.07, False)):  # the root mean square of X is 0.125
        found = report(X, little, gap=gap, is_exact_learner=False)
        assert (found.is_telling, found.is_stale) == (is_telling, is_telling)
    assert report(X, [0.0] * NUM_SEQUENCES, gap=0.4, is_exact_learner=False).is_stale
