"""The losses that balance experts, with numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.learner.model.routing import RowRouting, balance_losses, statistics_of

# Two experts, of which a token is sent to one. The softmax of these logits is (3/4, 1/4) and
# (1/4, 3/4).
FIRST, SECOND = [math.log(3.0), 0.0], [0.0, math.log(3.0)]
# A sequence of two tokens, padding, and a sequence of one token.
ROW = RowRouting(sequence_ids=torch.tensor([0, 0, -1, 1]), lengths=torch.tensor([2.0, 1.0]))
CHOSEN = torch.tensor([[True, False], [True, False], [False, False], [False, True]])


def logits_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, requires_grad=True)


def test_load_balancing_is_a_sum_over_sequences() -> None:
    """The first sequence: shares (1, 0), means (3/4, 1/4): 2 x 3/4; the second: shares (0, 1),
    means (1/4, 3/4): 2 x 3/4.
    """
    losses = balance_losses(ROW, logits_of(FIRST, FIRST, FIRST, SECOND), CHOSEN, 1, None)
    assert losses.load_balancing.item() == pytest.approx(3.0)


def test_a_balanced_sequence_has_a_loss_of_one() -> None:
    row = RowRouting(sequence_ids=torch.tensor([0, 0]), lengths=torch.tensor([2.0]))
    chosen = torch.tensor([[True, False], [False, True]])
    losses = balance_losses(row, logits_of(FIRST, SECOND), chosen, 1, None)
    assert losses.load_balancing.item() == pytest.approx(1.0)


def test_z_loss_is_a_sum_over_tokens() -> None:
    """The log-sum-exp of (ln 3, 0) is ln 4; padding does not count."""
    losses = balance_losses(ROW, logits_of(FIRST, FIRST, FIRST, SECOND), CHOSEN, 1, None)
    assert losses.z_loss.item() == pytest.approx(3 * math.log(4.0) ** 2)


def test_padding_has_no_gradient() -> None:
    logits = logits_of(FIRST, FIRST, FIRST, SECOND)
    losses = balance_losses(ROW, logits, CHOSEN, 1, None)
    (losses.load_balancing + losses.z_loss).backward()
    assert not logits.grad[2].any()
    assert logits.grad[[0, 1, 3]].abs().min() > 0.1


def test_a_row_of_filler_has_no_loss() -> None:
    row = RowRouting(sequence_ids=torch.tensor([-1, -1]), lengths=torch.tensor([0.0]))
    logits = logits_of(FIRST, SECOND)
    losses = balance_losses(row, logits, torch.zeros(2, 2, dtype=torch.bool), 1, None)
    assert losses.load_balancing.item() == losses.z_loss.item() == 0.0
    sums = statistics_of(row, logits, losses, 1, counts_sequences=True)
    assert sums.tolist() == [0.0] * 6


def test_statistics() -> None:
    logits = logits_of(FIRST, FIRST, [9.0, 1.0], SECOND)
    losses = balance_losses(ROW, logits, CHOSEN, 1, None)
    sums = statistics_of(ROW, logits, losses, 1, counts_sequences=True)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    z_loss = 3 * math.log(4.0) ** 2
    expected = [3.0, 2.0, 3 * entropy, 3 * math.log(3.0), z_loss, 3.0]
    assert sums.tolist() == pytest.approx(expected)
    assert statistics_of(ROW, logits, losses, 1, counts_sequences=False)[1] == 0.0
