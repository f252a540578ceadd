"""Log-probs of labels under a truncating sampler, over the columns that it could have chosen.

    logprob = y[label] - log sum exp(y)  over the support and the label,   y = logits / temperature

Computed with the aligned arithmetic of `logprobs.py` after setting the columns outside the support
to -inf: the bits do not depend on the number of shards, and those columns get no gradient. The
support (`support.py`) is determined from these logits, so because of rounding a token that the
engine chose may lie just outside of it; the label is kept anyway, and `is_outside` reports it.

With a head (`head_logprobs.py`), the columns of the head are kept too. The engine could have chosen
each of its tokens, so where the head holds the engine's whole support, its probabilities have a
score under the learner, whichever of them was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.ops.arguments import shard_of, without_ignored
from megatron_rl.ops.head_logprobs import HeadLogprobs, check_head, head_columns, write_columns
from megatron_rl.ops.kernels import TokenLogprobs
from megatron_rl.ops.support import find_support, keep_support
from megatron_rl.records import Truncation


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportLogprobs:
    """Log-probs of N rows, the same on every rank.

    Example, of a row with probabilities 0.5, 0.3, 0.2, top_k=2 and label 1: `logprobs` is
    log(0.3 / 0.8), `full_logprobs` is log(0.3), `is_outside` is False, `head_logprobs` is None.
    """

    logprobs: torch.Tensor  # [N] float32, of the truncated distribution; differentiable
    full_logprobs: torch.Tensor  # [N] float32, of the whole distribution; differentiable
    entropy: torch.Tensor  # [N] float32 in nats, of the whole distribution; no gradient
    is_outside: torch.Tensor  # [N] bool: the label is not in the support
    # [N, K] float32, of the truncated distribution; differentiable; 0 where the head has no token
    head_logprobs: torch.Tensor | None  # None: without a head


def support_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    truncation: Truncation,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    ignore_index: int | None = None,
    overwrite_logits: bool = False,
    head: torch.Tensor | None = None,
) -> SupportLogprobs:
    """`token_logprobs` of the truncated and of the whole distribution.

    Needs memory for one copy of the logits; with `overwrite_logits`, the gradient is written there.

    Args:
        truncation: of the sampler; if it excludes nothing, both log-probs are the same tensor.
        logits, labels, temperature, vocab_size, group, ignore_index, overwrite_logits: as for
            `token_logprobs`.
        head: [N, K] int64, K tokens of each row whose log-probs are computed too, distinct, -1 for
            none; the same on every rank. None: no head.

    Raises:
        As `token_logprobs`; DataError also if a token of the head is outside the vocabulary.
    """
    labels, is_counted = without_ignored(labels, ignore_index)
    shard = shard_of(logits, labels, temperature, vocab_size, group)
    if head is not None:
        check_head(head, logits.shape[0], shard.vocab_size)
    place = (is_counted, float(temperature), shard, group)

    def logprobs_of(logits, head, has_entropy):
        if head is None:
            found = TokenLogprobs.apply(logits, labels, *place, has_entropy, overwrite_logits)
            return found[0], None, *found[1:]
        return HeadLogprobs.apply(logits, labels, head, *place, has_entropy, overwrite_logits)

    head_of_whole = None if truncation.is_active else head
    full_logprobs, head_logprobs, entropy, maximum = logprobs_of(logits, head_of_whole, True)
    if not truncation.is_active:
        is_outside = torch.zeros_like(labels, dtype=torch.bool)
        return SupportLogprobs(
            logprobs=full_logprobs,
            full_logprobs=full_logprobs,
            entropy=entropy,
            is_outside=is_outside,
            head_logprobs=head_logprobs,
        )
    with torch.no_grad():
        columns = logits if logits.stride(1) == 1 else logits.contiguous()
        support = find_support(
            columns,
            labels,
            maximum,
            truncation=truncation,
            temperature=float(temperature),
            shard=shard,
            group=group,
        )
    kept = _KeepSupport.apply(logits, labels, support, float(temperature), shard, head)
    logprobs, head_logprobs, _, _ = logprobs_of(kept, head, False)
    is_outside = support.is_outside if is_counted is None else support.is_outside & is_counted
    return SupportLogprobs(
        logprobs=logprobs,
        full_logprobs=full_logprobs,
        entropy=entropy,
        is_outside=is_outside,
        head_logprobs=head_logprobs,
    )


class _KeepSupport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, support, temperature, shard, head):
        columns = logits if logits.stride(1) == 1 else logits.contiguous()
        kept = keep_support(columns, labels, support, temperature=temperature, shard=shard)
        if head is not None:
            at_head, is_local = head_columns(head, logits.shape[1], shard)
            write_columns(kept, at_head, is_local, columns.gather(1, at_head))
        return kept

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_kept):
        return grad_kept, *([None] * 5)  # a column at -inf has p = 0, and so no gradient
