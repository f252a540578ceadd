"""The factors of the losses that balance experts, with numbers worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.config import ObjectiveConfig, RejectionConfig
from megatron_rl.config.learner import MoeConfig
from megatron_rl.learner.batch.packing import empty_micro_batch, pack
from megatron_rl.learner.update.row_balance import balance_scales, needs_separate_pass
from megatron_rl.records import MicroBatch, RecomputedRow, Rollout, Sample

ALONE: Any = SimpleNamespace(
    is_last_stage=True,
    batch_reducer=lambda: lambda tensor, _operation: tensor,
    from_last_stage=lambda value: value,
)
MOE = MoeConfig(load_balancing_coefficient=0.1, z_loss_coefficient=0.01)
# Two sequences of 10 and 6 tokens, of which 8 and 4 were sampled.
LENGTHS, PROMPT = (10, 6), 2


def rows_of(*, recomputed: float | None = None) -> list[tuple[MicroBatch, RecomputedRow | None]]:
    samples = [
        Sample(
            prompt_index=number,
            sample_index=0,
            rollout=Rollout(
                token_ids=tuple(range(3, 3 + length)),
                loss_mask=tuple(position >= PROMPT for position in range(length)),
                rollout_logprobs=(-1.0,) * length,
                weight_versions=(0,) * length,
                finish_reason="stop",
                text="",
            ),
            reward=0.0,
            advantage=1.0,
        )
        for number, length in enumerate(LENGTHS)
    ]
    [row] = pack(samples, tokens_per_row=64)
    known = None
    if recomputed is not None:
        logprobs = torch.where(row.loss_mask, -1.0, 0.0)
        logprobs[: LENGTHS[0]] += recomputed * row.loss_mask[: LENGTHS[0]]
        known = RecomputedRow(
            micro_batch=row,
            recomputed_logprobs=logprobs,
            is_outside_support=torch.zeros_like(row.loss_mask),
        )
    return [(row, known), (empty_micro_batch(64), None)]


@pytest.mark.parametrize(
    ("normalize", "count"),
    [("token_mean", 12), ("sequence_mean", 2), ("sequence_sum", 2), ("constant", 5)],
)
def test_the_factors_undo_the_division_by_the_count(normalize: str, count: int) -> None:
    length = {"normalize_length": 32} if normalize == "constant" else {}
    config = ObjectiveConfig(normalize=normalize, **length)
    scales = balance_scales(rows_of(), MOE, config, ALONE, num_left_out=3)
    assert scales.load_balancing == pytest.approx(0.1 * count / 2)
    assert scales.z_loss == pytest.approx(0.01 * count / 16)


def test_rejected_tokens_are_not_counted() -> None:
    """The 8 sampled tokens of the first sequence are rejected."""
    config = ObjectiveConfig(
        normalize="token_mean",
        rejection=RejectionConfig(divergence="k1", level="token", lower=0.5, upper=2.0),
    )
    assert needs_separate_pass(MOE, config)
    scales = balance_scales(rows_of(recomputed=1.0), MOE, config, ALONE, num_left_out=0)
    assert scales.load_balancing == pytest.approx(0.1 * 4 / 2)


def test_nothing_is_asked_for_without_a_loss() -> None:
    config = ObjectiveConfig(rejection=RejectionConfig(veto_ratio=0.5))
    assert not needs_separate_pass(MoeConfig(), config)
    assert needs_separate_pass(MOE, config)
    assert not needs_separate_pass(MOE, ObjectiveConfig())
    assert balance_scales(rows_of(), MoeConfig(), config, ALONE, num_left_out=0) is None
