"""Log-probs of a row's label and of K further tokens, its head, with one backward pass.

    logprob(v) = y[v] - log sum exp(y),   y = x / temperature
    d (sum_v c[v] logprob(v)) / d x[j] = (c[j] - (sum_v c[v]) softmax(y)[j]) / temperature

The label and the head share the log-sum-exp of the aligned arithmetic (`reference.py`), so the
log-prob of a head token has the bits that it would have as the label, whatever the sharding. In the
backward pass the kernel of `token_logprobs` fills the gradient with the sum of all incoming
gradients, and then the K + 1 columns of label and head are written: each column is rounded once,
and there is no second copy of the logits.

Collectives, besides those of `token_logprobs`: one all-reduce of [N, K] float32 in the forward
pass, to which the rank that holds a token contributes its logit and every other rank 0.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from megatron_rl.errors import DataError
from megatron_rl.ops import kernels
from megatron_rl.ops.arithmetic import LARGEST_LOGIT, LN2, logarithm, scaled
from megatron_rl.ops.vocab_parallel import VocabShard, all_reduce_sum

ABSENT = -1  # in a head: there is no token


def check_head(head: torch.Tensor, num_rows: int, vocab_size: int) -> None:
    """Check shape, dtype and ids of a head; ids on a GPU make the log-prob NaN instead.

    Raises:
        ValueError: the shape or the dtype is wrong. DataError: a token is outside the vocabulary
            (on the CPU).
    """
    if head.dim() != 2 or head.shape[0] != num_rows or head.dtype != torch.int64:
        raise ValueError(
            f"head: expected token ids [{num_rows}, K] int64, got {tuple(head.shape)} {head.dtype}"
        )
    if head.device.type != "cpu":
        return
    is_outside = (head < ABSENT) | (head >= vocab_size)
    if bool(is_outside.any()):
        row, place = is_outside.nonzero()[0].tolist()
        raise DataError(
            f"head of row {row}: expected token ids of 0 to {vocab_size - 1}, or {ABSENT} for "
            f"none, got {int(head[row, place])}; do engine and model have the same vocabulary?"
        )


def head_columns(
    tokens: torch.Tensor, num_columns: int, shard: VocabShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where this rank's shard holds tokens [N, K]: their columns [N, K] int64, 0 if it does not
    hold the token, and whether it does, [N, K] bool.
    """
    width = min(max(shard.vocab_size - shard.start, 0), num_columns)
    columns = tokens - shard.start
    # The second condition excludes ABSENT in the first shard.
    is_local = (columns >= 0) & (tokens >= 0) & (columns < width)
    return torch.where(is_local, columns, 0), is_local


def write_columns(
    target: torch.Tensor, columns: torch.Tensor, is_local: torch.Tensor, values: torch.Tensor
) -> None:
    """Write `values` [N, K] to the `columns` [N, K] of `target` [N, V] where `is_local`.

    Entries that name the same column of a row must hold the same value. The host does not wait for
    the device: an entry that is not local repeats the row's first local one or, if there is none,
    the value that column 0 has already.
    """
    first = is_local.int().argmax(1, keepdim=True)
    has_local = is_local.any(1, keepdim=True)
    column = torch.where(has_local, columns.gather(1, first), 0)
    value = torch.where(has_local, values.gather(1, first), target[:, :1])
    target.scatter_(1, torch.where(is_local, columns, column), torch.where(is_local, values, value))


class HeadLogprobs(torch.autograd.Function):
    """Log-probs [N] of the labels and [N, K] of the head, entropy and largest y, as
    `kernels.TokenLogprobs`; both log-probs have a gradient.
    """

    @staticmethod
    def forward(
        ctx, logits, labels, head, is_counted, temperature, shard, group, has_entropy, overwrite
    ):
        """Arguments as in `TokenLogprobs`; head: [N, K] int64, distinct ids, or ABSENT, whose
        log-prob is 0.
        """
        words = kernels.nodes(
            logits, labels, temperature, shard.edges, shard.rank, shard.vocab_size, has_entropy
        )
        logprobs, entropy, exponent, total, maximum = kernels.gather_and_finish(
            words, labels, is_counted, shard, group, has_entropy
        )
        columns, is_local = head_columns(head, logits.shape[1], shard)
        y = torch.where(is_local, scaled(logits.gather(1, columns), temperature), 0.0)
        if y.numel() > 0:  # else every rank is without a head and skips the collective
            all_reduce_sum(y, group)
        # As `reference.finish` does with the logit of the label.
        is_sound = maximum.abs() <= LARGEST_LOGIT
        log_total = logarithm(torch.where(is_sound, total.double(), 1.0))
        normaliser = (exponent.double() * LN2 + log_total)[:, None]
        is_known = is_sound[:, None] & (head < shard.vocab_size)
        of_head = torch.where(is_known, (y.double() - normaliser).clamp(max=0.0), math.nan)
        of_head = torch.where(head < 0, 0.0, of_head.float())
        if is_counted is not None:
            of_head = torch.where(is_counted[:, None], of_head, 0.0)
        ctx.save_for_backward(logits, labels, head, is_counted, exponent, total, logprobs, of_head)
        ctx.temperature, ctx.shard = temperature, shard
        ctx.overwrite, ctx.is_overwritten = overwrite, False
        ctx.mark_non_differentiable(entropy, maximum)
        return logprobs, of_head, entropy, maximum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_head, _grad_entropy, _grad_maximum):
        """The gradient of the logits, from those of the log-probs [N] and [N, K] float32."""
        if ctx.is_overwritten:
            raise RuntimeError(
                "head_logprobs: expected one backward pass with overwrite_logits=True, got a "
                "second one; its logits are gone"
            )
        logits, labels, head, is_counted, exponent, total, logprobs, of_head = ctx.saved_tensors
        grad_head = torch.where(head < 0, 0.0, grad_head)
        grad_logprobs = kernels.zero_ignored(grad_logprobs, is_counted)
        if is_counted is not None:
            grad_head = torch.where(is_counted[:, None], grad_head, 0.0)
        grad_logits, ctx.is_overwritten = kernels.gradient_buffer(logits, ctx.overwrite)
        incoming = grad_logprobs.double() + grad_head.double().sum(1)
        kernels.gradient(
            logits,
            labels,
            incoming.float(),
            exponent,
            total,
            ctx.temperature,
            ctx.shard.start,
            ctx.shard.vocab_size,
            grad_logits,
        )
        # If the label is in the head, both entries are given the gradient of both.
        is_label = head == labels[:, None]
        at_label = grad_logprobs.double() + torch.where(is_label, grad_head, 0.0).double().sum(1)
        at_head = grad_head.double() + torch.where(is_label, grad_logprobs[:, None], 0.0)
        own = torch.cat([at_head, at_label[:, None]], dim=1)
        probabilities = torch.cat([of_head, logprobs[:, None]], dim=1).double().exp()
        values = (own - incoming[:, None] * probabilities) / ctx.temperature
        tokens = torch.cat([head, labels[:, None]], dim=1)
        columns, is_local = head_columns(tokens, grad_logits.shape[1], ctx.shard)
        write_columns(grad_logits, columns, is_local, values.to(grad_logits.dtype))
        return grad_logits, *([None] * 8)
