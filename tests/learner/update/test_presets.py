"""Every preset on rows of which nothing, or not everything, can be learnt: without a model, on one
rank.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.config import ObjectiveConfig
from megatron_rl.config.presets import PRESETS
from megatron_rl.learner.batch.packing import empty_micro_batch, pack
from megatron_rl.learner.passes.forward import LossTerms, RowOutput
from megatron_rl.learner.update.row_correction import batch_scalars
from megatron_rl.learner.update.row_loss import (
    MiniBatchLoss,
    StepSettings,
    UpdateRow,
    dropped_results,
)
from megatron_rl.observe.metrics import merge, reduce
from megatron_rl.records import MicroBatch, RecomputedRow
from tests.learner.support.edge_batch import (
    EMPTY,
    FAILED,
    FAR,
    FAR_DISTANCE,
    LENGTH,
    MASKED,
    NEAR_DISTANCE,
    PLAIN,
    TOKENS_PER_ROW,
    edge_samples,
    kind_of,
    preset_configs,
)

RECOMPUTED = math.log(0.5)  # of every token
REJECTING = ("geometric_rejection", "k3_rejection")
ALONE: Any = SimpleNamespace(batch_reducer=lambda: lambda tensor, _operation: tensor)


def row_of(*kinds: str) -> MicroBatch:
    """All responses of these kinds; of no kind, a row that only fills up."""
    samples = [sample for sample in edge_samples(has_heads=True) if kind_of(sample) in kinds]
    if not samples:
        return empty_micro_batch(TOKENS_PER_ROW)
    [row] = pack(samples, tokens_per_row=TOKENS_PER_ROW)
    distance = torch.full_like(row.rollout_logprobs, NEAR_DISTANCE)
    distance[1::2] = -NEAR_DISTANCE
    far = [number for number, sample in enumerate(row.samples) if kind_of(sample) == FAR]
    distance[torch.isin(row.sequence_ids, torch.tensor(far))] = -FAR_DISTANCE
    logprobs = torch.where(row.loss_mask, RECOMPUTED + distance, 0.0)
    return replace(row, rollout_logprobs=logprobs)


def recomputed_of(row: MicroBatch) -> RecomputedRow:
    return RecomputedRow(
        micro_batch=row,
        recomputed_logprobs=torch.where(row.loss_mask, RECOMPUTED, 0.0),
        is_outside_support=torch.zeros_like(row.loss_mask),
        recomputed_head_logprobs=None if row.head_ids is None else row.rollout_head_logprobs + 0.5,
    )


def loss_of(
    config: ObjectiveConfig, row: MicroBatch, known: RecomputedRow | None = None
) -> tuple[LossTerms, torch.Tensor]:
    """The loss of the row, and its gradient by the log-probs."""
    known = known or recomputed_of(row)
    logprobs = known.recomputed_logprobs.clone().requires_grad_()
    update_row = UpdateRow(micro_batch=row, recomputed=known, reference_logprobs=None)
    loss = MiniBatchLoss([update_row], settings_of(config, row), num_left_out=0)
    output = RowOutput(
        logprobs=logprobs,
        full_logprobs=logprobs,
        entropy=torch.where(row.loss_mask, 1.0, 0.0),
        is_outside_support=torch.zeros_like(row.loss_mask),
        head_logprobs=known.recomputed_head_logprobs,
    )
    terms = loss(0, output)
    terms.total.backward()
    return terms, logprobs.grad


def settings_of(config: ObjectiveConfig, row: MicroBatch) -> StepSettings:
    scalars = batch_scalars([recomputed_of(row)], [], config, ALONE, tolerance=0.0)
    return StepSettings(
        config=config,
        dual_value=0.5 if config.constraint.enabled else 0.0,
        tolerance=0.0037,
        scalars=scalars,
        weight_version=0,
        place="step 1, rank 0",
    )


@pytest.fixture(scope="module")
def objectives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ObjectiveConfig]:
    configs = preset_configs(tmp_path_factory.mktemp("presets"), iter(PRESETS))
    return {name: config.objective for name, config in configs.items()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kinds", [(), (EMPTY,), (MASKED,), (EMPTY, MASKED)], ids=str)
def test_rows_without_a_token_give_nothing_and_break_nothing(
    preset: str, kinds: tuple[str, ...], objectives: dict[str, ObjectiveConfig]
) -> None:
    config, row = objectives[preset], row_of(*kinds)
    terms, gradient = loss_of(config, row)
    assert (terms.total.item(), terms.num_kept) == (0.0, 0)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    # A sequence without a kept token counts where the sequences that were sampled count.
    assert int(terms.count) == (len(row.samples) if config.normalize == "constant" else 0)
    # Every rank reduces the same metrics, and this one adds nothing to them.
    full, _ = loss_of(config, row_of(PLAIN, FAR))
    assert terms.result.metrics.keys() == full.result.metrics.keys()
    both = figures(terms, full)
    if config.normalize == "constant":
        both.pop("loss/mean")
    alone = figures(full)
    assert {key: both[key] for key in both} == {key: alone[key] for key in both}


def figures(*parts: LossTerms) -> dict[str, float]:
    merged = merge(each.result.metrics for each in parts)
    return reduce(merged, lambda tensor, _operation: tensor)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_rejected_response_has_no_loss_and_keeps_its_gap(
    preset: str, objectives: dict[str, ObjectiveConfig]
) -> None:
    config, row = objectives[preset], row_of(FAR)
    terms, gradient = loss_of(config, row)
    is_rejected = preset in REJECTING
    num_tokens = int(row.loss_mask.sum())
    assert terms.num_kept == (0 if is_rejected else num_tokens)
    assert torch.isfinite(terms.total) and torch.isfinite(gradient).all()
    if is_rejected:
        assert terms.total.item() == 0.0
        assert torch.equal(gradient, torch.zeros_like(gradient))
    found = figures(terms)
    gap = 0.5 - 0.5 * math.exp(-FAR_DISTANCE)
    assert found["discrepancy/mean"] == pytest.approx(gap, rel=1e-5)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_plain_responses_are_learnt_from_beside_all_others(
    preset: str, objectives: dict[str, ObjectiveConfig]
) -> None:
    config, row = objectives[preset], row_of(PLAIN, MASKED, EMPTY)
    terms, gradient = loss_of(config, row)
    assert terms.num_kept == int(row.loss_mask.sum())
    assert torch.equal(gradient[~row.loss_mask], torch.zeros(int((~row.loss_mask).sum())))
    assert int((gradient[row.loss_mask] != 0).sum()) > 0
    counts = {"token_mean": terms.num_kept, "constant": len(row.samples)}
    assert int(terms.count) == counts.get(config.normalize, 2)
    if config.normalize == "constant":
        assert config.normalize_length == LENGTH


@pytest.mark.parametrize("preset", PRESETS)
def test_a_failed_response_has_its_gap_measured_and_nothing_else(
    preset: str, objectives: dict[str, ObjectiveConfig]
) -> None:
    row = recomputed_of(row_of(FAILED))
    [result] = dropped_results([row], settings_of(objectives[preset], row.micro_batch))
    assert not any(key.startswith(("loss/", "constraint/")) for key in result.metrics)
    expected = (math.exp(NEAR_DISTANCE) - math.exp(-NEAR_DISTANCE)) / 4
    assert result.discrepancy.mean == pytest.approx(expected, rel=1e-3)


def test_every_sampled_token_outside_the_support_before_the_update_counts(
    objectives: dict[str, ObjectiveConfig],
) -> None:
    """Three of 19 in a row that is learnt from, rejected or not, and three of 12 in a dropped one;
    not the ones that this update's own forward pass finds outside.
    """
    config = objectives["geometric_rejection"]
    for kinds, num_tokens in (((PLAIN,), 19), ((FAR,), 8), ((FAILED,), 12)):
        row = row_of(*kinds)
        assert int(row.loss_mask.sum()) == num_tokens
        is_outside = torch.zeros_like(row.loss_mask)
        is_outside[row.loss_mask.nonzero()[:3, 0]] = True
        is_outside[~row.loss_mask] = True  # of no sampled token
        known = replace(recomputed_of(row), is_outside_support=is_outside)
        if kinds == (FAILED,):
            [result] = dropped_results([known], settings_of(config, row))
        else:
            result = loss_of(config, row, known)[0].result
        share = result.metrics["discrepancy/outside_support/mean"]
        assert (float(share.sum), float(share.count)) == (3.0, num_tokens)
