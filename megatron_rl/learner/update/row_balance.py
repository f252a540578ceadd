"""The factors with which the losses that balance experts enter the sum of a mini-batch
(learner/model/routing.py).

Megatron divides all gradients by the sum of the counts that the rows' losses return. That sum is
known before the first backward pass unless a rejection depends on the recomputed log-probs; then
they are needed from a separate pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rl.config.learner import MoeConfig
from megatron_rl.config.objective import ObjectiveConfig
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.routing import BalanceScales
from megatron_rl.learner.update.row_correction import correct_row
from megatron_rl.objective.normalize import normalized_sum
from megatron_rl.records import MicroBatch, RecomputedRow


def needs_separate_pass(moe: MoeConfig, config: ObjectiveConfig) -> bool:
    """Whether the counts of a mini-batch, which the factors need, depend on a separate pass."""
    rejection = config.rejection
    return moe.has_loss and (
        rejection.divergence != "none" or rejection.veto_ratio > 0 or rejection.veto_probability > 0
    )


def balance_scales(
    rows: Sequence[tuple[MicroBatch, RecomputedRow | None]],
    moe: MoeConfig,
    config: ObjectiveConfig,
    parallel: Parallel,
    *,
    num_left_out: int,
) -> BalanceScales | None:
    """The factors of a mini-batch, the same on every rank; None without such losses. A collective
    over all ranks if there are.

    Args:
        rows: this rank's, each with its recomputed log-probs if there was a separate pass.
        num_left_out: see `TrainBatch`.
    """
    if not moe.has_loss:
        return None
    scales = None
    if parallel.is_last_stage:
        # the count of the loss, sequences, and tokens
        sums = torch.zeros(3, dtype=torch.float64)
        for index, (micro_batch, recomputed) in enumerate(rows):
            left_out = num_left_out if index == 0 else 0
            sums[0] += _count(micro_batch, recomputed, config, left_out)
            sums[1] += len(micro_batch.samples)
            sums[2] += sum(len(sample.rollout.token_ids) for sample in micro_batch.samples)
        count, num_sequences, num_tokens = parallel.batch_reducer()(sums, "sum").tolist()
        scales = BalanceScales(
            load_balancing=moe.load_balancing_coefficient * count / max(num_sequences, 1.0),
            z_loss=moe.z_loss_coefficient * count / max(num_tokens, 1.0),
        )
    return parallel.from_last_stage(scales)


def _count(
    micro_batch: MicroBatch,
    recomputed: RecomputedRow | None,
    config: ObjectiveConfig,
    num_left_out: int,
) -> int:
    """The count that the row's loss will return."""
    kept = micro_batch.loss_mask if recomputed is None else correct_row(recomputed, config).kept
    _, count = normalized_sum(
        torch.zeros_like(micro_batch.rollout_logprobs),
        kept,
        micro_batch.sequence_ids,
        normalize=config.normalize,
        num_sampled=len(micro_batch.samples) + num_left_out,
        length=config.normalize_length,
    )
    return int(count)
