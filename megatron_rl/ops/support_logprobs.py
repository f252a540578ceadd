"""Log-probs of labels under a truncating sampler, over the columns that it could have chosen.

    logprob = y[label] - log sum exp(y)  over the support and the label,   y = logits / temperature

Computed with the aligned arithmetic of `logprobs.py` after setting the columns outside the support
to -inf: the bits do not depend on the number of shards, and those columns get no gradient. The
support (`support.py`) is determined from these logits, so because of rounding a token that the
engine chose may lie just outside of it; the label is kept anyway, and `is_outside` reports it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.ops.arguments import shard_of, without_ignored
from megatron_rl.ops.kernels import TokenLogprobs
from megatron_rl.ops.support import find_support, keep_support
from megatron_rl.records import Truncation


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportLogprobs:
    """Log-probs of N rows, the same on every rank.

    Example, of a row with probabilities 0.5, 0.3, 0.2, top_k=2 and label 1: `logprobs` is
    log(0.3 / 0.8), `full_logprobs` is log(0.3), `is_outside` is False.
    """

    logprobs: torch.Tensor  # [N] float32, of the truncated distribution; differentiable
    full_logprobs: torch.Tensor  # [N] float32, of the whole distribution; differentiable
    entropy: torch.Tensor  # [N] float32 in nats, of the whole distribution; no gradient
    is_outside: torch.Tensor  # [N] bool: the label is not in the support


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
) -> SupportLogprobs:
    """`token_logprobs` of the truncated and of the whole distribution.

    Needs memory for one copy of the logits; with `overwrite_logits`, the gradient is written there.

    Args:
        truncation: of the sampler; if it excludes nothing, both log-probs are the same tensor.
        logits, labels, temperature, vocab_size, group, ignore_index, overwrite_logits: as for
            `token_logprobs`.

    Raises:
        As `token_logprobs`.
    """
    labels, is_counted = without_ignored(labels, ignore_index)
    shard = shard_of(logits, labels, temperature, vocab_size, group)
    temperature = float(temperature)
    full_logprobs, entropy, maximum = TokenLogprobs.apply(
        logits, labels, is_counted, temperature, shard, group, True, overwrite_logits
    )
    if not truncation.is_active:
        is_outside = torch.zeros_like(labels, dtype=torch.bool)
        return SupportLogprobs(
            logprobs=full_logprobs,
            full_logprobs=full_logprobs,
            entropy=entropy,
            is_outside=is_outside,
        )
    with torch.no_grad():
        columns = logits if logits.stride(1) == 1 else logits.contiguous()
        support = find_support(
            columns,
            labels,
            maximum,
            truncation=truncation,
            temperature=temperature,
            shard=shard,
            group=group,
        )
    kept = _KeepSupport.apply(logits, labels, support, temperature, shard)
    logprobs, _, _ = TokenLogprobs.apply(
        kept, labels, is_counted, temperature, shard, group, False, overwrite_logits
    )
    is_outside = support.is_outside if is_counted is None else support.is_outside & is_counted
    return SupportLogprobs(
        logprobs=logprobs, full_logprobs=full_logprobs, entropy=entropy, is_outside=is_outside
    )


class _KeepSupport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, support, temperature, shard):
        columns = logits if logits.stride(1) == 1 else logits.contiguous()
        return keep_support(columns, labels, support, temperature=temperature, shard=shard)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_kept):
        return grad_kept, None, None, None, None  # a column at -inf has p = 0, and so no gradient
