"""Log-probs of labels under a sampler that truncates: over the columns it could have chosen.

    logprob = y[label] - log sum exp(y)  over the support and the label,   y = logits / temperature

in the aligned arithmetic of `logprobs.py`, with what lies outside at -inf: the same bits whatever
the number of shards, and no gradient outside. The support (`support.py`) is found anew from these
logits, so a label that the engine chose can lie just outside by rounding: it is kept, and told.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.ops.logprobs import TokenLogprobs, shard_of, without_ignored
from megatron_rl.ops.support import find_support, keep_support
from megatron_rl.records import Truncation


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportLogprobs:
    """Of [N] rows; the same on every rank. Example, of probabilities 0.5, 0.3, 0.2 with top_k=2 and
    label 1: `logprobs` log(0.3 / 0.8), `full_logprobs` log(0.3), `is_outside` False.
    """

    logprobs: torch.Tensor  # [N] float32, of the truncated distribution; differentiable
    full_logprobs: torch.Tensor  # [N] float32, of the whole one; differentiable
    entropy: torch.Tensor  # [N] float32, of the whole one, in nats; no gradient
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

    Extra memory: one copy of the logits, which takes the gradient with `overwrite_logits`.

    Args:
        truncation: the sampler's; where it excludes nothing, both log-probs are the same tensor.
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
