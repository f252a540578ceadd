"""Normalises per-token losses into the pair `(weighted sum, integer count)` that Megatron's loss
contract requires.

With `calculate_per_token_loss`, Megatron adds both over micro-batches and over all data-parallel
ranks, and divides the gradients by the count once
(megatron/core/distributed/finalize_model_grads.py). Therefore all weighting is part of the sum, and
with the weights below the result does not depend on the micro-batch or rank of a sequence:

    token_mean:     weight 1,        count = kept tokens             -> mean over all kept tokens
    sequence_mean:  weight 1 / n_s,  count = sequences with n_s > 0  -> mean of sequences' means
    sequence_sum:   weight 1,        count = sequences with n_s > 0  -> mean of sequences' sums
    constant:       weight 1 / L,    count = sequences that were sampled
                                     -> sum over tokens / (sequences x L)

`n_s` is the number of kept tokens of sequence s; each sequence is whole in a row. The sequences
that were sampled are all responses of the groups that the mini-batch learns from: also a response
without a token, one whose tokens are all rejected, and one that is left out because it was
truncated or could not be scored (`TrainBatch.num_left_out`).
token_mean is the normalisation of DAPO (arXiv 2503.14476), sequence_mean that of GRPO and GSPO, and
constant that of Dr. GRPO (arXiv 2503.20783), where L is the maximum response length. With constant,
a token's weight depends neither on the length of its response nor on what is rejected or left out.
"""

from __future__ import annotations

from typing import get_args

import torch

from megatron_rl.config.choices import Normalize
from megatron_rl.errors import ConfigError
from megatron_rl.objective.sequences import num_sequences

MODES = get_args(Normalize)


def kept_tokens_per_sequence(
    mask: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int
) -> torch.Tensor:
    """The number of tokens of each sequence that the mask keeps.

    Args:
        mask: [T] bool.
        sequence_ids: [T] int64, 0 to S-1, -1 on padding.
        num_sequences: S.

    Returns:
        [S] int64; 0 for an empty or fully masked sequence.
    """
    _check_same_shape(mask=mask, sequence_ids=sequence_ids)
    counts = torch.zeros(num_sequences + 1, dtype=torch.int64, device=mask.device)
    # Index 0 collects the padding, whose id is -1.
    counts.index_add_(0, sequence_ids + 1, mask.long())
    return counts[1:]


def token_weights(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every kept token a weight of 1.

    Args:
        mask: [T] bool, the kept tokens.

    Returns:
        weights [T] float32, 0 where masked; count [] int32, the number of kept tokens.
    """
    return mask.float(), mask.sum(dtype=torch.int32)


def sequence_weights(
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    num_kept_tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the kept tokens of each sequence equal weights that add up to 1.

    Args:
        mask: [T] bool, the kept tokens.
        sequence_ids: [T] int64, 0 to S-1, -1 on padding.
        num_kept_tokens: [S] int64, from `kept_tokens_per_sequence`.

    Returns:
        weights [T] float32, 0 where masked; count [] int32, the number of sequences with a kept
        token.
    """
    _check_same_shape(mask=mask, sequence_ids=sequence_ids)
    if num_kept_tokens.numel() == 0:
        return torch.zeros_like(mask, dtype=torch.float32), mask.new_zeros((), dtype=torch.int32)
    per_token = num_kept_tokens[sequence_ids.clamp(min=0)].clamp(min=1).float()
    # The mask should exclude padding (id -1); if it does not, padding still has no weight.
    is_kept = mask & (sequence_ids >= 0)
    weights = torch.where(is_kept, per_token.reciprocal(), 0.0)
    count = (num_kept_tokens > 0).sum(dtype=torch.int32)
    return weights, count


def normalized_sum(
    per_token_loss: torch.Tensor,
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    *,
    normalize: str,
    num_sampled: int = 0,
    length: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two values that a Megatron loss function returns.

    Args:
        per_token_loss: [T] float32, 0 where masked (`objective.policy_loss`).
        mask: [T] bool, the kept tokens.
        sequence_ids: [T] int64, 0 to S-1, -1 on padding.
        normalize: one of `MODES`, see the docstring of this module.
        num_sampled: used by "constant": the sequences to count, kept or not.
        length: L, used by "constant", at least 1.

    Returns:
        sum [] float32, under gradient, and attached to the graph even if every token is masked (a
        rank that skipped the backward pass would make the others hang); count [] int32.

    Raises:
        ConfigError: `normalize` is unknown.
    """
    _check_same_shape(per_token_loss=per_token_loss, mask=mask, sequence_ids=sequence_ids)
    if normalize == "token_mean":
        weights, count = token_weights(mask)
    elif normalize in MODES:
        num_kept_tokens = kept_tokens_per_sequence(mask, sequence_ids, num_sequences(sequence_ids))
        weights, count = sequence_weights(mask, sequence_ids, num_kept_tokens)
        if normalize != "sequence_mean":
            weights = mask.float()
        if normalize == "constant":
            weights = weights.double() / _at_least_one(length)
            count = torch.full_like(count, num_sampled)
    else:
        raise ConfigError(
            f"objective.normalize: expected one of {', '.join(MODES)}, got {normalize!r}"
        )
    # The advantages of a group cancel. The sum is taken in float64, so that the small remainder
    # keeps its digits.
    return (per_token_loss.double() * weights.double()).sum().float(), count


def _at_least_one(length: int) -> int:
    if length < 1:
        raise ConfigError(
            f"objective.normalize_length: expected at least 1 with normalize=constant, got {length}"
        )
    return length


def _check_same_shape(**tensors: torch.Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"expected tensors of one shape [T], got {shapes}")
