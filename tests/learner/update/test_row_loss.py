"""The loss of one row, put together from its settings: numbers worked by hand, without a model.

Two sequences of two and one sampled tokens, and padding. p_train = 1/2, 1/4, 1/2;
p_inf = 1/4, 1/4, 5/8; the policy is where the update starts, so every ratio is 1 unless said.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.config import (
    ConstraintConfig,
    ImportanceConfig,
    KLConfig,
    ObjectiveConfig,
    RejectionConfig,
)
from megatron_rl.errors import DivergenceError
from megatron_rl.learner.passes.forward import RowOutput
from megatron_rl.learner.update.row_correction import BatchScalars, batch_scalars
from megatron_rl.learner.update.row_loss import (
    MiniBatchLoss,
    StepSettings,
    UpdateRow,
    dropped_results,
)
from megatron_rl.observe.metrics import reduce
from megatron_rl.records import MicroBatch, RecomputedRow, Sample
from tests.fakes.groups import make_rollout

TRAIN, ROLLOUT = (0.5, 0.25, 0.5), (0.25, 0.25, 0.625)
REFERENCE = (0.25, 0.25, 0.5)
ADVANTAGES = (1.0, 1.0, -2.0)
DUAL_VALUE = 0.4
SAMPLE = Sample(prompt_index=0, sample_index=0, rollout=make_rollout(), reward=0.0, advantage=0.0)
token_mean = partial(ObjectiveConfig, normalize="token_mean")
FREE = token_mean(constraint=ConstraintConfig(enabled=False))


def row_of(rollout: tuple[float, ...], advantages: tuple[float, ...]) -> MicroBatch:
    padded = torch.tensor([*rollout, 1.0])
    integers = torch.zeros(4, dtype=torch.int64)
    return MicroBatch(
        tokens=integers,
        labels=integers,
        positions=integers,
        loss_mask=torch.tensor([True, True, True, False]),
        rollout_logprobs=padded.log(),
        advantages=torch.tensor([*advantages, 0.0]),
        weight_versions=integers,
        sequence_ids=torch.tensor([0, 0, 1, -1]),
        cu_seqlens=torch.tensor([0, 2, 3], dtype=torch.int32),
        cu_seqlens_padded=torch.tensor([0, 2, 3], dtype=torch.int32),
        samples=(SAMPLE, SAMPLE),
    )


def recomputed_row(
    rollout: tuple[float, ...] = ROLLOUT, advantages: tuple[float, ...] = ADVANTAGES
) -> RecomputedRow:
    """The row with the learner's log-probs before the update."""
    logprobs = torch.tensor([*TRAIN, 1.0]).log()
    return RecomputedRow(
        micro_batch=row_of(rollout, advantages),
        recomputed_logprobs=logprobs,
        is_outside_support=torch.zeros(4, dtype=torch.bool),
    )


def settings_of(
    config: ObjectiveConfig,
    *,
    dual_value: float = 0.0,
    weight_mean: float = 1.0,
    baseline: float = 0.0,
) -> StepSettings:
    return StepSettings(
        config=config,
        dual_value=dual_value,
        tolerance=0.1,
        scalars=BatchScalars(weight_mean=weight_mean, baseline=baseline),
        weight_version=0,
        place="step 1, rank 0",
    )


def run(
    config: ObjectiveConfig,
    *,
    dual_value: float = 0.0,
    policy: tuple[float, ...] = TRAIN,
    rollout: tuple[float, ...] = ROLLOUT,
    advantages: tuple[float, ...] = ADVANTAGES,
    should_recompute: bool = True,
    weight_mean: float = 1.0,
    baseline: float = 0.0,
    num_left_out: int = 0,
) -> tuple[float, int, list[float], dict[str, float]]:
    """Sum, count, gradient of the sum by the three log-probs, metrics."""
    logprobs = torch.tensor([*policy, 1.0]).log().requires_grad_()
    entropy = torch.tensor([1.0, 2.0, 4.0, 99.0])
    settings = settings_of(
        config, dual_value=dual_value, weight_mean=weight_mean, baseline=baseline
    )
    known = recomputed_row(rollout, advantages)
    row = UpdateRow(
        micro_batch=known.micro_batch,
        recomputed=known if should_recompute else None,
        reference_logprobs=torch.tensor([*REFERENCE, 1.0]).log() if config.kl.reference else None,
    )
    loss = MiniBatchLoss([row], settings, num_left_out=num_left_out)
    output = RowOutput(
        logprobs=logprobs,
        full_logprobs=logprobs,
        entropy=entropy,
        is_outside_support=torch.tensor([False, True, False, True]),
    )
    terms = loss(0, output)
    result = terms.result
    terms.total.backward()
    assert logprobs.grad[3] == 0
    assert result.recomputed.micro_batch is row.micro_batch
    assert not result.recomputed.recomputed_logprobs.requires_grad
    metrics = reduce(result.metrics, lambda tensor, _operation: tensor)
    assert result.discrepancy.mean == metrics.get(
        "constraint/signal/mean", metrics["discrepancy/mean"]
    )
    return terms.total.item(), int(terms.count), logprobs.grad[:3].tolist(), metrics


def close(*numbers: float) -> object:
    return pytest.approx(list(numbers), rel=1e-5, abs=1e-7)


def test_plain():
    total, count, gradient, _ = run(FREE)
    assert (total, count) == (0.0, 3)
    assert gradient == close(-1.0, -1.0, 2.0)


def test_shaped_advantages():
    # delta = 1/4, 0, 1/8, times 0.4
    config = token_mean()
    total, _, gradient, metrics = run(config, dual_value=DUAL_VALUE)
    assert gradient == close(-0.9, -1.0, 2.05)
    assert total == pytest.approx(0.15, rel=1e-5)
    assert metrics["constraint/penalty/mean"] == pytest.approx(0.05, rel=1e-5)
    assert metrics["constraint/penalty_share/mean"] == pytest.approx(0.15 / 4, rel=1e-5)
    token = replace(config, constraint=ConstraintConfig(gate="token", max_discrepancy=0.2))
    # beyond 0.1, and a gap counts as at most 0.2: 0.1, 0, 0.025
    assert run(token, dual_value=DUAL_VALUE)[2] == close(-0.96, -1.0, 2.01)


def test_a_baseline_leaves_the_mean_advantage_as_it_was():
    # delta = 1/4, 0, 1/8 counted from their mean of 1/8, times 0.4
    config = token_mean(constraint=ConstraintConfig(baseline="batch"))
    total, _, gradient, metrics = run(config, dual_value=DUAL_VALUE, baseline=0.125)
    assert gradient == close(-0.95, -1.05, 2.0)
    assert total == pytest.approx(0.0, abs=1e-6)
    assert metrics["constraint/penalty/mean"] == pytest.approx(0.05, rel=1e-5)


def test_the_baseline_is_the_mean_of_what_is_penalised_over_the_kept_tokens():
    constraint = ConstraintConfig(baseline="batch", gate="token")
    config = token_mean(constraint=constraint)
    assert baseline_of(config) == pytest.approx((0.15 + 0.0 + 0.025) / 3, rel=1e-5)
    # k2 of a rho of 2 is 0.24: the first token is rejected.
    rejection = RejectionConfig(divergence="k2", level="token", upper=0.1)
    assert baseline_of(replace(config, rejection=rejection)) == pytest.approx(0.0125, rel=1e-5)
    assert baseline_of(replace(config, constraint=ConstraintConfig(gate="mean"))) == 0


def baseline_of(config: ObjectiveConfig) -> float:
    """Of one row, alone in the world, with a tolerance of 0.1."""
    return scalars_of([recomputed_row()], [], config).baseline


def scalars_of(
    rows: list[RecomputedRow],
    dropped: list[RecomputedRow],
    config: ObjectiveConfig,
    tolerance: float = 0.1,
) -> BatchScalars:
    alone = SimpleNamespace(batch_reducer=lambda: lambda tensor, _operation: tensor)
    return batch_scalars(rows, dropped, config, alone, tolerance=tolerance)


def test_dropped_rows_count_in_the_mean_gap_alone():
    # A mean gap of 1/8 is within 0.13; with a dropped row of 1/2, 1/4 and 1/2 it is not.
    config = token_mean(constraint=ConstraintConfig(gate="mean", baseline="batch"))
    far = recomputed_row((1.0, 0.5, 1.0))
    without, with_dropped = (
        scalars_of([recomputed_row()], each, config, 0.13) for each in ([], [far])
    )
    assert (without.is_gate_open, with_dropped.is_gate_open) == (False, True)
    assert without.baseline == with_dropped.baseline == pytest.approx(0.125, rel=1e-5)
    [result] = dropped_results([far], settings_of(config))
    assert result.recomputed is far
    assert result.discrepancy.mean == pytest.approx(1.25 / 3, rel=1e-6)
    assert not any(key.startswith("loss/") for key in result.metrics)


def test_a_differentiable_penalty():
    # 0.4 |p_theta - p_inf|: up in the loss, gradient 0.4 x sign x p_theta
    config = token_mean(constraint=ConstraintConfig(penalty="differentiable"))
    total, _, gradient, _ = run(config, dual_value=DUAL_VALUE)
    assert total == pytest.approx(0.4 * 0.375, rel=1e-5)
    assert gradient == close(-1.0 + 0.2, -1.0, 2.0 - 0.2)
    token = replace(config, constraint=replace(config.constraint, gate="token"))
    total, _, gradient, _ = run(token, dual_value=DUAL_VALUE)
    assert total == pytest.approx(0.4 * (0.15 + 0.025), rel=1e-5)
    assert gradient == close(-1.0 + 0.2, -1.0, 2.0 - 0.2)


def test_a_squared_penalty_is_of_this_update_and_of_the_kept_tokens():
    # p_theta / p_inf = 2, 1, 0.8: squares of r - 1, and their slopes 2 (r - 1) r
    constraint = ConstraintConfig(penalty="squared_ratio")
    config = token_mean(constraint=constraint)
    total, count, gradient, metrics = run(config, dual_value=DUAL_VALUE)
    assert (total, count) == (pytest.approx(0.4 * 1.04, rel=1e-5), 3)
    assert gradient == close(-1.0 + 0.4 * 4, -1.0, 2.0 - 0.4 * 0.32)
    assert metrics["constraint/penalty/mean"] == pytest.approx(0.4 * 1.04 / 3, rel=1e-5)
    # A policy that has come to the engine's probabilities pays nothing.
    total, _, gradient, metrics = run(config, dual_value=DUAL_VALUE, policy=ROLLOUT)
    assert metrics["constraint/penalty/mean"] == 0
    assert total == run(FREE, policy=ROLLOUT)[0]
    # k1 rejects the first token, whose rho is 2.
    rejection = RejectionConfig(divergence="k1", level="token", upper=1.5)
    _, count, gradient, _ = run(replace(config, rejection=rejection), dual_value=DUAL_VALUE)
    assert (count, gradient) == (2, close(0.0, -1.0, 2.0 - 0.4 * 0.32))


def test_another_signal_shapes_the_advantages_opens_the_gate_and_drives_lambda():
    # |rho - 1| = 1, 0, 0.2
    constraint = ConstraintConfig(measure="ratio")
    config = token_mean(constraint=constraint)
    _, _, gradient, metrics = run(config, dual_value=DUAL_VALUE)
    assert gradient == close(-(1 - 0.4), -1.0, 2 + 0.4 * 0.2)
    assert metrics["constraint/signal/mean"] == pytest.approx(0.4, rel=1e-6)
    assert metrics["discrepancy/mean"] == pytest.approx(0.125, rel=1e-6)
    gated = replace(config, constraint=replace(constraint, gate="mean", baseline="batch"))
    for tolerance, is_open in ((0.39, True), (0.41, False)):
        scalars = scalars_of([recomputed_row()], [], gated, tolerance)
        assert (scalars.is_gate_open, scalars.baseline) == (is_open, pytest.approx(0.4, rel=1e-6))
    # A rejected token still counts in what drives lambda, and so does a dropped row.
    rejection = RejectionConfig(divergence="k1", level="token", upper=1.5)
    rejecting = run(replace(config, rejection=rejection), dual_value=DUAL_VALUE)[3]
    assert rejecting["constraint/signal/mean"] == pytest.approx(0.4, rel=1e-6)
    [dropped] = dropped_results([recomputed_row()], settings_of(config))
    assert dropped.discrepancy.mean == pytest.approx(0.4, rel=1e-6)


def test_importance_weights_scale_the_shaped_surrogate():
    # rho = 2, 1, 0.8; bounded to 1.5, 1, 0.8; over a global mean of 1.25: 1.2, 0.8, 0.64
    config = token_mean(importance=ImportanceConfig(level="token", upper=1.5))
    assert run(config, dual_value=DUAL_VALUE)[2] == close(-0.9 * 1.5, -1.0, 2.05 * 0.8)
    normalized = replace(config, importance=replace(config.importance, batch_normalize=True))
    _, _, gradient, metrics = run(normalized, weight_mean=1.25)
    assert gradient == close(-1.2, -0.8, 2 * 0.64)
    assert metrics["correction/weight/max"] == pytest.approx(1.2, rel=1e-5)
    # Not the penalty: a token of weight 0 is still pulled back.
    masked = token_mean(
        constraint=ConstraintConfig(penalty="differentiable"),
        importance=ImportanceConfig(level="token", mode="mask", upper=1.5),
    )
    _, count, gradient, _ = run(masked, dual_value=DUAL_VALUE)
    assert gradient == close(0.2, -1.0, 2 * 0.8 - 0.2)
    assert count == 3


def test_cis_bounds_a_weight_by_the_learners_probability():
    # rho = 2, 1, 0.8, and 1 + 1.5 * (1 - p_train) = 1.75 for the first token; policy_logprobs,
    # which the update has moved, do not matter.
    importance = ImportanceConfig(level="token", mode="cis", cis_slope=1.5)
    config = replace(FREE, importance=importance)
    _, _, gradient, metrics = run(config)
    assert gradient == close(-1.75, -1.0, 2 * 0.8)
    assert metrics["correction/outside_bounds/mean"] == pytest.approx(1 / 3)
    assert run(config, policy=(0.55, 0.25, 0.5))[2] == close(-1.75 * 1.1, -1.0, 2 * 0.8)


def test_rejected_tokens_leave_sum_and_count_but_not_the_gap():
    config = replace(
        FREE, rejection=RejectionConfig(divergence="k1", level="token", lower=0.0, upper=1.5)
    )
    _, count, gradient, metrics = run(config)
    assert (count, gradient) == (2, close(0.0, -1.0, 2.0))
    assert metrics["discrepancy/mean"] == pytest.approx(0.125, rel=1e-5)
    assert metrics["correction/rejected_tokens/mean"] == pytest.approx(1 / 3)
    veto = replace(FREE, rejection=RejectionConfig(veto_ratio=0.9))
    assert run(veto)[1:3] == (2, close(-1.0, -1.0, 0.0))
    # Dr. GRPO still counts the sequence that was rejected, and three that are in no row.
    constant = replace(veto, normalize="constant", normalize_length=4)
    assert run(constant)[1:3] == (2, close(-0.25, -0.25, 0.0))
    assert run(constant, num_left_out=3)[1:3] == (5, close(-0.25, -0.25, 0.0))
    assert run(replace(veto, normalize="sequence_sum"))[1] == 1


def test_bypass_takes_the_engine_as_the_old_policy():
    # Ratios 2, 1, 0.8; the first is clipped.
    config = replace(FREE, old_policy="rollout")
    _, _, gradient, metrics = run(config, should_recompute=False)
    assert gradient == close(0.0, -1.0, 2 * 0.8)
    assert metrics["loss/ratio/max"] == pytest.approx(2.0, rel=1e-5)
    # r - 1 - log r of the engine's tokens
    kl = (1 - math.log(2) + 0 - 0.2 - math.log(0.8)) / 3
    assert metrics["loss/rollout_kl/mean"] == pytest.approx(kl, rel=1e-5)
    assert "loss/update_kl/mean" not in metrics
    assert metrics["discrepancy/mean"] == pytest.approx(0.125, rel=1e-5)
    constrained = token_mean(old_policy="rollout")
    _, _, gradient, _ = run(constrained, dual_value=DUAL_VALUE, should_recompute=False)
    assert gradient == close(0.0, -1.0, 2.05 * 0.8)


def test_bypass_caps_the_ratio_and_a_dual_clip_replaces_the_cap():
    # p_theta / p_inf of the last token, whose advantage is -2, is 0.5 / 0.01 = 50.
    config, rollout = replace(FREE, old_policy="rollout"), (0.5, 0.25, 0.01)
    _, _, gradient, metrics = run(config, rollout=rollout, should_recompute=False)
    assert gradient == close(-1.0, -1.0, 2 * 20.0)
    assert metrics["loss/clip_fraction_cap/mean"] == pytest.approx(1 / 3)
    open_config = replace(config, ratio_cap=0.0)
    assert run(open_config, rollout=rollout)[2] == close(-1.0, -1.0, 2 * 50.0)
    total, _, gradient, metrics = run(replace(config, dual_clip=3.0), rollout=rollout)
    assert (gradient, total) == (close(-1.0, -1.0, 0.0), pytest.approx(-2.0 + 2 * 3.0, rel=1e-6))
    assert metrics["loss/clip_fraction_dual/mean"] == pytest.approx(1 / 3)
    assert "loss/clip_fraction_cap/mean" not in metrics


def test_opsm_compares_the_policy_with_the_engine():
    # log(p_inf / p_theta) of the second sequence, whose advantage is negative, is log(0.625 / 0.5)
    # = 0.223 before any update; that of the first one, -0.347 in the mean, does not matter.
    config = replace(FREE, rejection=RejectionConfig(opsm_threshold=0.2))
    _, count, gradient, metrics = run(config)
    assert (count, gradient) == (3, close(-1.0, -1.0, 0.0))
    assert metrics["correction/opsm_masked_sequences/mean"] == 0.5
    assert metrics["correction/opsm_masked_tokens/mean"] == pytest.approx(1 / 3)
    # An update that raises p_theta to 0.52, by 1.04 above p_train: log(0.625 / 0.52) = 0.184.
    assert run(config, policy=(0.5, 0.25, 0.52))[2] == close(-1.0, -1.0, 2 * 1.04)
    # The same under bypass, whose ratio is 0.52 / 0.625 = 0.832.
    bypass = replace(config, old_policy="rollout")
    assert run(bypass, should_recompute=False)[2] == close(0.0, -1.0, 0.0)
    above = run(bypass, policy=(0.5, 0.25, 0.52), should_recompute=False)[2]
    assert above == close(0.0, -1.0, 2 * 0.832)


def test_opsm_judges_a_sequence_by_its_rejected_tokens_too():
    # rho of the first token is 0.5 / 0.875 = 0.571, so k1 rejects it. log(p_inf / p_theta) of its
    # sequence is log 1.75 and 0, in the mean 0.28; of the kept token alone it would be 0.
    rejection = RejectionConfig(divergence="k1", level="token", lower=0.6, opsm_threshold=0.2)
    config = replace(FREE, rejection=rejection)
    rollout, advantages = (0.875, 0.25, 0.5), (-1.0, -1.0, -2.0)
    _, count, gradient, metrics = run(config, rollout=rollout, advantages=advantages)
    assert (count, gradient) == (2, close(0.0, 0.0, 2.0))
    assert metrics["correction/opsm_masked_tokens/mean"] == 0.5  # of the kept tokens


def test_opsm_beside_importance_weights():
    config = replace(
        FREE,
        importance=ImportanceConfig(level="token", upper=1.5),
        rejection=RejectionConfig(opsm_threshold=0.05),
    )
    assert run(config)[2] == close(-1.5, -1.0, 0.0)
    near = replace(config, rejection=RejectionConfig(opsm_threshold=0.25))
    assert run(near)[2] == close(-1.5, -1.0, 2 * 0.8)


def test_the_reference_pulls():
    # p_ref / p_theta = 1/2, 1, 1: k3's gradient by log p_theta is 1 - p_ref / p_theta.
    kl = KLConfig(coefficient=0.2, reference="models/base")
    total, _, gradient, metrics = run(replace(FREE, kl=kl))
    assert gradient == close(-1.0 + 0.1, -1.0, 2.0)
    assert total == pytest.approx(0.2 * (math.log(2) - 0.5), rel=1e-5)
    assert metrics["reference/kl_k1/mean"] == pytest.approx(math.log(2) / 3, rel=1e-5)
    in_advantages = replace(kl, estimator="k1")
    _, _, gradient, _ = run(replace(FREE, kl=in_advantages))
    assert gradient == close(-(1.0 - 0.2 * math.log(2)), -1.0, 2.0)
    measured = replace(kl, coefficient=0.0)
    assert run(replace(FREE, kl=measured))[2] == close(-1.0, -1.0, 2.0)


def test_entropy_is_added_to_what_is_maximised():
    config = replace(FREE, entropy_coefficient=0.1)
    assert run(config)[0] == pytest.approx(-0.7, rel=1e-5)


def test_broken_logprobs_are_told_with_step_rank_and_row():
    with pytest.raises(DivergenceError, match=r"step 1, rank 0, row 0: rollout log-prob"):
        run(FREE, rollout=(0.25, math.nan, 0.5))
    with pytest.raises(DivergenceError, match=r"step 1, rank 0, dropped row 0: rollout log-prob"):
        dropped_results([recomputed_row((0.25, math.nan, 0.5))], settings_of(FREE))
