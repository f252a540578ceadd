import itertools

import pytest
import torch

from megatron_rl.errors import ConfigError
from megatron_rl.objective.normalize import (
    MODES,
    kept_tokens_per_sequence,
    normalized_sum,
    sequence_weights,
    token_weights,
)

LENGTH = 40  # of normalize=constant


def test_token_mean_worked_by_hand():
    loss = torch.tensor([1.0, 2.0, 0.0, 4.0, 0.0])
    mask = torch.tensor([True, True, False, True, False])
    ids = torch.tensor([0, 0, 1, 1, -1])
    total, count = normalized_sum(loss, mask, ids, normalize="token_mean")
    assert (total.item(), count.item(), count.dtype) == (7.0, 3, torch.int32)


def test_sequence_mean_worked_by_hand():
    # Sequence 0 keeps two tokens (mean 1.5), 1 keeps one (4), 2 keeps none and does not count.
    loss = torch.tensor([1.0, 2.0, 0.0, 4.0, 0.0, 0.0])
    mask = torch.tensor([True, True, False, True, False, False])
    ids = torch.tensor([0, 0, 1, 1, 2, -1])
    total, count = normalized_sum(loss, mask, ids, normalize="sequence_mean")
    assert (total.item(), count.item(), count.dtype) == (5.5, 2, torch.int32)


def test_sequence_sum_and_constant_worked_by_hand():
    # Sequence 0 keeps two tokens, 1 one of two, 2 lost its only one, 3 has no response. All four
    # were sampled, and two more are in no row.
    loss = torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    kept = torch.tensor([True, True, True, False, False, False, False])
    ids = torch.tensor([0, 0, 1, 1, 2, 3, -1])
    total, count = normalized_sum(loss, kept, ids, normalize="sequence_sum")
    assert (total.item(), count.item()) == (7.0, 2)
    total, count = normalized_sum(loss, kept, ids, normalize="constant", num_sampled=6, length=8)
    assert (total.item(), count.item(), count.dtype) == (7.0 / 8, 6, torch.int32)
    with pytest.raises(ConfigError, match="normalize_length"):
        normalized_sum(loss, kept, ids, normalize="constant", num_sampled=6)


def test_weights_of_a_sequence_add_up_to_one():
    mask = torch.tensor([True] * 7 + [False] * 2 + [True] * 3)
    ids = torch.tensor([0] * 7 + [1] * 2 + [2] * 3)
    kept = kept_tokens_per_sequence(mask, ids, 4)
    assert kept.tolist() == [7, 0, 3, 0]
    weights, count = sequence_weights(mask, ids, kept)
    assert weights[:7].sum().item() == pytest.approx(1.0, rel=1e-6)
    assert weights[7:9].tolist() == [0.0, 0.0]
    assert weights[9:].sum().item() == pytest.approx(1.0, rel=1e-6)
    assert count.item() == 2


@pytest.mark.parametrize("normalize", ["token_mean", "sequence_mean"])
def test_a_fully_masked_row_gives_zero_and_a_graph(normalize):
    loss = torch.zeros(4, requires_grad=True)
    total, count = normalized_sum(
        loss, torch.zeros(4, dtype=torch.bool), torch.full((4,), -1), normalize=normalize
    )
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0)
    assert loss.grad.tolist() == [0.0] * 4


def test_padding_does_not_count_even_if_the_mask_forgot_it():
    weights, _ = sequence_weights(
        torch.tensor([True, True]), torch.tensor([0, -1]), torch.tensor([1])
    )
    assert weights.tolist() == [1.0, 0.0]


def test_no_sequence_at_all():
    mask, ids = torch.zeros(3, dtype=torch.bool), torch.full((3,), -1)
    weights, count = sequence_weights(mask, ids, torch.zeros(0, dtype=torch.int64))
    assert (weights.tolist(), count.item()) == ([0.0] * 3, 0)
    weights, count = token_weights(mask)
    assert (weights.tolist(), count.item()) == ([0.0] * 3, 0)


def test_unknown_mode_and_shapes():
    ids, mask = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"token_mean, sequence_mean, .*, got 'mean'"):
        normalized_sum(torch.zeros(2), mask, ids, normalize="mean")
    with pytest.raises(ValueError, match=r"\[T\]"):
        normalized_sum(torch.zeros(3), mask, ids, normalize="token_mean")


def _rows(sequences, budget):
    """Sequences, each (its numbers, its mask), packed first come, first served into rows."""
    rows, row = [], []
    for sequence in sequences:
        if row and sum(len(numbers) for numbers, _ in [*row, sequence]) > budget:
            rows.append(row)
            row = []
        row.append(sequence)
    return [*rows, row]


def _layout_gradient(parameter, sequences, normalize, dp, budget):
    """What Megatron makes of it: sums and counts over micro-batches and ranks, divided once."""
    per_rank = [_rows(sequences[rank::dp], budget) for rank in range(dp)]
    num_rows = max(len(rows) for rows in per_rank) + 1  # the last one is fully masked everywhere
    totals, counts = [], []
    for rows in per_rank:
        for row in [*rows, *([[]] * (num_rows - len(rows)))]:
            values, mask, ids = torch.zeros(budget), torch.zeros(budget).bool(), torch.ones(budget)
            ids, start = -ids.long(), 0
            for index, (numbers, kept) in enumerate(row):
                part = slice(start, start + len(numbers))
                values[part], mask[part], ids[part] = numbers, kept, index
                start = part.stop
            loss = torch.where(mask, (parameter * values).sin(), 0.0)
            total, count = normalized_sum(
                loss, mask, ids, normalize=normalize, num_sampled=len(row), length=LENGTH
            )
            totals.append(total)
            counts.append(count)
    count = torch.stack(counts).sum()
    loss = torch.stack([total.double() for total in totals]).sum() / count
    (gradient,) = torch.autograd.grad(loss, parameter)
    return loss.item(), gradient.item(), count.item()


@pytest.mark.parametrize("normalize", MODES)
def test_no_layout_changes_loss_or_gradient(normalize):
    torch.manual_seed(1)
    sequences = []
    for length in (5, 16, 1, 9, 12, 3, 30, 7, 2, 11, 4):
        sequences.append((torch.randn(length), torch.rand(length) < 0.6))
    sequences[3] = (sequences[3][0], torch.zeros(9, dtype=torch.bool))  # nothing kept
    sequences.insert(5, (torch.zeros(0), torch.zeros(0, dtype=torch.bool)))  # empty
    parameter = torch.tensor(0.7, requires_grad=True)

    kept = [(numbers[mask].double(), mask) for numbers, mask in sequences if mask.any()]
    exact = parameter.detach().double().requires_grad_()
    means = [(exact * numbers).sin() for numbers, _ in kept]
    expected_loss = {
        "token_mean": torch.cat(means).mean(),
        "sequence_mean": torch.stack([mean.mean() for mean in means]).mean(),
        "sequence_sum": torch.stack([mean.sum() for mean in means]).mean(),
        "constant": torch.cat(means).sum() / (len(sequences) * LENGTH),
    }[normalize]
    (expected_gradient,) = torch.autograd.grad(expected_loss, exact)

    for dp, budget in itertools.product((1, 2, 3, 4), (32, 48, 128)):
        loss, gradient, count = _layout_gradient(parameter, sequences, normalize, dp, budget)
        assert loss == pytest.approx(expected_loss.item(), rel=1e-6), (dp, budget)
        assert gradient == pytest.approx(expected_gradient.item(), rel=1e-6), (dp, budget)
        tokens = sum(int(mask.sum()) for _, mask in kept)
        counts = {"token_mean": tokens, "constant": len(sequences)}
        assert count == counts.get(normalize, len(kept))
