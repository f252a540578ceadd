"""A row's centering term within its loss: numbers worked by hand, without a model.

Two sequences of one sampled token each, and padding. The vocabulary has three tokens, with the same
probabilities at both: p_train = 1/2, 1/4, 1/4 and p_inf = 1/4, 1/4, 1/2. The heads are the tokens 2
and 0, so that R_q = R_p = 1/4. The first sequence sampled token 0 (rho = 2) with A = 1, the second
token 2 (rho = 1/2) with A = -2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_rl.config import (
    ConstraintConfig,
    ImportanceConfig,
    ObjectiveConfig,
    RejectionConfig,
    ScoreCenteringConfig,
)
from megatron_rl.errors import DataError
from megatron_rl.learner.passes.forward import RowOutput
from megatron_rl.learner.update.row_correction import BatchScalars
from megatron_rl.learner.update.row_loss import MiniBatchLoss, StepSettings, UpdateRow
from megatron_rl.observe.metrics import reduce
from megatron_rl.records import MicroBatch, Rollout, Sample

TRAIN, ROLLOUT, HEAD = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5), (2, 0)
CENTERED = ObjectiveConfig(
    normalize="token_mean",
    constraint=ConstraintConfig(enabled=False),
    score_centering=ScoreCenteringConfig(enabled=True, num_logprobs=2),
)
TIS = ImportanceConfig(level="token", upper=1.5)


def logs(probabilities: tuple[float, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([probabilities[token] for token in tokens]).log()


def heads(probabilities: tuple[float, ...], at_padding: float) -> torch.Tensor:
    """[3, 2] of the two tokens and of the padding."""
    head = logs(probabilities, HEAD)
    return torch.stack([head, head, torch.full((2,), at_padding)])


def row_of(*, has_heads: bool = True) -> MicroBatch:
    integers = torch.zeros(3, dtype=torch.int64)
    rollout = Rollout(
        token_ids=(1, 5, 9, 0),
        loss_mask=(False, False, False, True),
        rollout_logprobs=(0.0, 0.0, 0.0, -1.0),
        weight_versions=(-1, -1, -1, 0),
        finish_reason="stop",
        text="",
    )
    sample = Sample(prompt_index=4, sample_index=0, rollout=rollout, reward=0.0, advantage=0.0)
    return MicroBatch(
        tokens=integers,
        labels=integers,
        positions=integers,
        loss_mask=torch.tensor([True, True, False]),
        rollout_logprobs=torch.cat([logs(ROLLOUT, (0, 2)), torch.zeros(1)]),
        advantages=torch.tensor([1.0, -2.0, 0.0]),
        weight_versions=integers,
        sequence_ids=torch.tensor([0, 1, -1]),
        cu_seqlens=torch.tensor([0, 1, 2], dtype=torch.int32),
        cu_seqlens_padded=torch.tensor([0, 1, 2], dtype=torch.int32),
        samples=(sample,),
        head_ids=torch.tensor([HEAD, HEAD, (-1, -1)], dtype=torch.int32) if has_heads else None,
        rollout_head_logprobs=heads(ROLLOUT, -torch.inf) if has_heads else None,
    )


def run(
    config: ObjectiveConfig,
    *,
    row: MicroBatch | None = None,
    policy: tuple[float, ...] = TRAIN,
    is_later: bool = False,
    weight_mean: float = 1.0,
) -> tuple[list[float], list[list[float]], dict[str, float]]:
    """The gradient of the row's sum to the log-probs of the labels and of the heads; metrics."""
    row = row_of() if row is None else row

    def output_of(probabilities: tuple[float, ...]) -> RowOutput:
        labels = torch.cat([logs(probabilities, (0, 2)), torch.zeros(1)]).requires_grad_()
        of_head = heads(probabilities, 0.0).requires_grad_()
        return RowOutput(
            logprobs=labels,
            full_logprobs=labels,
            entropy=torch.zeros(3),
            is_outside_support=torch.zeros(3, dtype=torch.bool),
            head_logprobs=None if row.head_ids is None else of_head,
        )

    settings = StepSettings(
        config=config,
        dual_value=0.0,
        tolerance=0.1,
        scalars=BatchScalars(weight_mean=weight_mean),
        weight_version=0,
        place="step 1, rank 0",
    )
    known = output_of(TRAIN).recomputed_row(row) if is_later else None
    update = UpdateRow(micro_batch=row, recomputed=known, reference_logprobs=None)
    output = output_of(policy)
    terms = MiniBatchLoss([update], settings, num_left_out=0)(0, output)
    terms.total.backward()
    of_head = torch.zeros(3, 2) if output.head_logprobs is None else output.head_logprobs.grad
    metrics = reduce(terms.result.metrics, lambda tensor, _operation: tensor)
    return output.logprobs.grad.tolist(), of_head.tolist(), metrics


def close(*numbers: float) -> object:
    return pytest.approx(list(numbers), abs=1e-6)


def test_plain():
    # c = A (1/2 - 1/4, 1/4 - 1/2)
    labels, of_head, metrics = run(CENTERED)
    assert labels == close(-1.0, 2.0, 0.0)
    assert of_head == [close(0.25, -0.25), close(-0.5, 0.5), close(0.0, 0.0)]
    assert metrics["score_centering/head_mass/mean"] == pytest.approx(0.75)
    assert metrics["score_centering/size/mean"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["loss/mean"] == pytest.approx((-1 + 2) / 2)  # the surrogate's


def test_weights_and_their_mean_are_those_of_the_sampled_tokens():
    # f = 1.5 and 1/2; c = A (1/2 * 1/2 - 1/4, 1/4 * 1.5 - 1/2)
    config = replace(CENTERED, importance=TIS)
    labels, of_head, _ = run(config)
    assert labels == close(-1.5, 1.0, 0.0)
    assert of_head == [close(0.0, -0.125), close(0.0, 0.25), close(0.0, 0.0)]
    normalized = replace(config, importance=replace(TIS, batch_normalize=True))
    labels, of_head, _ = run(normalized, weight_mean=1.25)
    assert labels == close(-1.2, 0.8, 0.0)
    assert of_head == [close(0.0, -0.1), close(0.0, 0.2), close(0.0, 0.0)]
    # 1 + 0.8 * (1 - 1/2) = 1.4 for token 0, and 1.8 for tokens of the rest
    cis = replace(config, importance=ImportanceConfig(level="token", mode="cis", cis_slope=0.8))
    labels, of_head, _ = run(cis)
    assert labels == close(-1.4, 1.0, 0.0)
    assert of_head == [close(0.0, -0.15), close(0.0, 0.3), close(0.0, 0.0)]


def test_later_updates_use_the_ratio_of_the_head():
    # p_theta = 0.55, 0.225, 0.225: ratios 1.1 and 0.9. R_p = 0.225 and R_old = R_q = 1/4, so the
    # ratio of the rest is 0.9, and R_q / R_p times it is 1.
    moved = (0.55, 0.225, 0.225)
    labels, of_head, _ = run(CENTERED, policy=moved, is_later=True)
    assert labels == close(-1.1, 2 * 0.9, 0.0)
    centers = (0.5 * 0.9 - 0.225, 0.25 * 1.1 - 0.55)
    assert of_head[:2] == [close(*centers), close(*(-2 * each for each in centers))]
    weighted = replace(CENTERED, importance=TIS)
    labels, of_head, _ = run(weighted, policy=moved, is_later=True)
    assert labels == close(-1.65, 0.9, 0.0)
    assert of_head[0] == close(0.25 * 0.9 - 0.225, 0.375 * 1.1 - 0.55)


def test_sequences_that_are_rejected_or_masked_have_no_term():
    # rho of the first sequence is 2.
    rejection = RejectionConfig(divergence="k1", level="sequence_mean", upper=1.5)
    labels, of_head, _ = run(replace(CENTERED, rejection=rejection))
    assert labels == close(0.0, 2.0, 0.0)
    assert of_head == [close(0.0, 0.0), close(-0.5, 0.5), close(0.0, 0.0)]
    # log(p_inf / p_theta) of the second one is log 2, and its advantage is negative.
    opsm = RejectionConfig(opsm_threshold=0.5)
    labels, of_head, metrics = run(replace(CENTERED, rejection=opsm))
    assert labels == close(-1.0, 0.0, 0.0)
    assert of_head == [close(0.25, -0.25), close(0.0, 0.0), close(0.0, 0.0)]
    assert metrics["correction/opsm_masked_sequences/mean"] == 0.5
    nothing = RejectionConfig(divergence="k2", level="sequence_max", upper=1e-9)
    labels, of_head, metrics = run(replace(CENTERED, rejection=nothing))
    assert labels == close(0.0, 0.0, 0.0) and of_head == [close(0.0, 0.0)] * 3
    assert "score_centering/size/mean" not in metrics


def test_a_filler_row_has_no_heads_and_a_row_of_samples_must_have_them():
    nothing = torch.zeros(3, dtype=torch.bool)
    filler = replace(row_of(has_heads=False), loss_mask=nothing, samples=())
    labels, of_head, _ = run(CENTERED, row=filler)
    assert labels == close(0.0, 0.0, 0.0) and of_head == [close(0.0, 0.0)] * 3
    refused = partial(run, CENTERED, row=row_of(has_heads=False))
    with pytest.raises(DataError, match=r"row of prompts \[4\]: expected rollouts with heads, "):
        refused()
