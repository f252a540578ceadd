"""Computes the term of one row's loss that centers the score (objective/score_centering.py), from
the row's heads and its settings.
"""

from __future__ import annotations

import torch

from megatron_rl.errors import DataError
from megatron_rl.learner.passes.forward import RowOutput
from megatron_rl.objective.inputs import LossInputs, PolicyLoss
from megatron_rl.objective.score_centering import HeadLogprobs, TokenWeights, centering_term
from megatron_rl.observe.metrics import Metric
from megatron_rl.records import RecomputedRow


def center_row(
    surrogate: PolicyLoss,
    inputs: LossInputs,
    row: RecomputedRow,
    output: RowOutput,
    weights: TokenWeights | None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """`centering_term` of a row; a row without heads, which is masked, gets a term of 0.

    Args:
        inputs: of the sampled tokens, whose mask says which of them have a score.
        weights: f of any tokens' old and rollout log-probs, as it weights the sampled tokens; None:
            1.

    Raises:
        DataError: the row has samples, but no heads.
    """
    return centering_term(surrogate, inputs, _heads(row, output), weights)


def _heads(row: RecomputedRow, output: RowOutput) -> HeadLogprobs:
    micro_batch = row.micro_batch
    if micro_batch.head_ids is None:
        if any(sample.rollout.num_response_tokens for sample in micro_batch.samples):
            prompts = sorted({sample.prompt_index for sample in micro_batch.samples})
            raise DataError(
                f"row of prompts {prompts}: expected rollouts with heads, because "
                "objective.score_centering.enabled=true, got none"
            )
        nothing = output.logprobs.new_zeros(output.logprobs.shape[0], 0)
        return HeadLogprobs(is_present=nothing.bool(), policy=nothing, old=nothing, rollout=nothing)
    return HeadLogprobs(
        is_present=micro_batch.head_ids >= 0,
        policy=output.head_logprobs,
        old=row.recomputed_head_logprobs,
        rollout=micro_batch.rollout_head_logprobs,
    )
