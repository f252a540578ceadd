"""Log-probs of labels, from logits or from hidden states and the weight of the output layer.

    y = x / temperature,    logprob = y[label] - log sum exp(y)  over the true vocabulary
    d logprob / d x[j] = ([j == label] - softmax(y)[j]) / temperature

The arithmetic is one fixed order of rounded steps, defined in `reference.py` and implemented by
every kernel. The same logits therefore give the same bits, independent of the number of shards and
their padding, the batch and its order, the number of threads, the device and its vector width. The
error is at most 5e-7 x max(1, |logprob|) compared with float64. The matrix product of
`linear_token_logprobs` is torch's and rounds in its own way.

`kernels.py` chooses the implementation: C++ kernels on the CPU; on a CUDA device the CUDA kernels,
or the much slower `reference.py` in a build without them.

Collectives: one all-gather of a few dozen int32 per row in the forward pass, independent of the
number of chunks, and none in the backward pass of `token_logprobs`. Every rank of the group must
pass the same labels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.errors import ConfigError
from megatron_rl.ops import kernels
from megatron_rl.ops.arguments import check_rows, shard_of, without_ignored
from megatron_rl.ops.kernels import TokenLogprobs, gather_and_finish, zero_ignored
from megatron_rl.ops.node_layout import words_per_row
from megatron_rl.ops.vocab_parallel import (
    all_reduce_sum,
    gather_rows,
    reduce_scatter_rows,
    vocab_shard,
)


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    ignore_index: int | None = None,
    overwrite_logits: bool = False,
) -> torch.Tensor:
    """Log-prob of one label per row.

    Args:
        logits: [N, V] float32, bfloat16 or float16: this rank's contiguous shard, as wide as every
            other rank's. -inf is allowed (a column that cannot be sampled).
        labels: [N] int64, global token ids, the same on every rank.
        temperature: the sampler's; logits are divided by it in float32.
        vocab_size: V without the padded columns, which are the last global ones; None: no padding.
        group: tensor-parallel group over which the vocabulary is sharded, or None.
        ignore_index: rows with this label give 0 and get no gradient; their logits may hold
            anything.
        overwrite_logits: the backward pass writes the gradient over the logits instead of into
            separate memory (of which, on the CPU, at most 512 MiB are kept for the next gradient).
            Nothing else may use the logits then; a second backward pass raises RuntimeError.

    Returns:
        [N] float32, never above 0, the same on every rank. The gradient has the logits' dtype,
        rounded once, and is +0 on padded columns and on rows whose incoming gradient is 0. The
        incoming gradient must be the same on every rank.

    Raises:
        DataError: a label is outside the vocabulary. DivergenceError: a row has NaN or +inf, or its
            largest logit is outside +-2^21 after division by the temperature (also if all are
            -inf). Both name the row and are raised on every rank: at once on the CPU; on a CUDA
            device the log-prob of the row is NaN, and the next `broken_rows.check_broken_rows`
            raises, so that the host need not wait here.
        ValueError: shapes or dtypes are wrong. ConfigError: the temperature is 0 or below, or the
            native extension is not built.
    """
    labels, is_counted = without_ignored(labels, ignore_index)
    shard = shard_of(logits, labels, temperature, vocab_size, group)
    logprobs, _, _ = TokenLogprobs.apply(
        logits, labels, is_counted, float(temperature), shard, group, False, overwrite_logits
    )
    return logprobs


def token_logprobs_and_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    ignore_index: int | None = None,
    overwrite_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and the entropy of every row's distribution.

    Returns:
        Log-probs [N] float32, and entropies [N] float32 in nats: never below 0, 0 where the label
        is ignored, without gradient.
    Raises:
        As `token_logprobs`.
    """
    labels, is_counted = without_ignored(labels, ignore_index)
    shard = shard_of(logits, labels, temperature, vocab_size, group)
    logprobs, entropy, _ = TokenLogprobs.apply(
        logits, labels, is_counted, float(temperature), shard, group, True, overwrite_logits
    )
    return logprobs, entropy


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    chunk_size: int = 1024,
    ignore_index: int | None = None,
    sequence_parallel: bool = False,
) -> torch.Tensor:
    """`token_logprobs(hidden @ weight.T, labels)`, computed `chunk_size` rows of logits at a time.

    The backward pass computes the logits of each chunk again. Every product has `chunk_size` rows,
    the last one padded with zeros, because the bits of a product depend on its number of rows.

    Args:
        hidden: [N, H] float32, bfloat16 or float16, the same on every rank of the group; with
            sequence_parallel only this rank's [N / TP, H], in order of rank.
        weight: [V, H], hidden's dtype: this rank's shard of the output layer.
        labels, temperature, vocab_size, group, ignore_index: as for `token_logprobs`.
        chunk_size: rows of logits at a time, at least 1.
        sequence_parallel: each rank of the group holds the same number of consecutive rows of
            hidden; they are gathered here, in both passes.

    Returns:
        [N] float32. The gradient of `hidden` is already summed over the group (one all-reduce, or
        reduce-scatter, in float32), so the caller must not reduce it again; the gradient of
        `weight` is that of this rank's shard, accumulated in float32.

    Raises:
        As `token_logprobs`.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_token_logprobs: expected hidden [N, H] and weight [V, H], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"linear_token_logprobs: expected one dtype, got hidden {hidden.dtype} "
            f"and weight {weight.dtype}"
        )
    if chunk_size < 1:
        raise ConfigError(
            f"linear_token_logprobs: expected chunk_size of at least 1, got {chunk_size}"
        )
    labels, is_counted = without_ignored(labels, ignore_index)
    shard = vocab_shard(weight.shape[0], vocab_size, group)
    num_rows = hidden.shape[0] * (len(shard.edges) - 1 if sequence_parallel else 1)
    check_rows(hidden.dtype, num_rows, labels, temperature, shard)
    return _LinearTokenLogprobs.apply(
        hidden,
        weight,
        labels,
        is_counted,
        float(temperature),
        shard,
        group,
        chunk_size,
        sequence_parallel,
    )


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        labels,
        is_counted,
        temperature,
        shard,
        group,
        chunk_size,
        sequence_parallel,
    ):
        ctx.save_for_backward(hidden, weight, labels, is_counted)
        ctx.sequence_parallel = sequence_parallel
        if sequence_parallel:
            hidden = gather_rows(hidden, group).flatten(0, 1)
        width = words_per_row(shard.edges, shard.vocab_size, has_entropy=False)
        words = torch.empty(hidden.shape[0], width, dtype=torch.int32, device=hidden.device)
        for rows, padded_hidden in _row_tiles(hidden, chunk_size):
            logits = (padded_hidden @ weight.T)[: rows.stop - rows.start]
            words[rows] = kernels.nodes(
                logits, labels[rows], temperature, shard.edges, shard.rank, shard.vocab_size, False
            )
        logprobs, _, ctx.exponent, ctx.total, _ = gather_and_finish(
            words, labels, is_counted, shard, group, False
        )
        ctx.temperature, ctx.shard = temperature, shard
        ctx.group, ctx.chunk_size = group, chunk_size
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs):
        hidden, weight, labels, is_counted = ctx.saved_tensors
        grad_logprobs = zero_ignored(grad_logprobs, is_counted)
        if ctx.sequence_parallel:
            hidden = gather_rows(hidden, ctx.group).flatten(0, 1)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows, padded_hidden in _row_tiles(hidden, ctx.chunk_size):
            logits = padded_hidden @ weight.T
            num_rows = rows.stop - rows.start
            kernels.gradient(
                logits[:num_rows],
                labels[rows],
                grad_logprobs[rows],
                ctx.exponent[rows],
                ctx.total[rows],
                ctx.temperature,
                ctx.shard.start,
                ctx.shard.vocab_size,
                logits[:num_rows],
            )
            logits[num_rows:] = 0.0
            grad_hidden[rows] = (logits @ weight)[:num_rows]
            grad_weight += logits.T @ padded_hidden
        if ctx.sequence_parallel:
            grad_hidden = reduce_scatter_rows(grad_hidden, ctx.group)
        else:
            all_reduce_sum(grad_hidden, ctx.group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), *([None] * 7)


def _row_tiles(hidden: torch.Tensor, chunk_size: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Tiles of exactly `chunk_size` rows, the last one padded with zeros."""
    num_rows = hidden.shape[0]
    for start in range(0, num_rows, chunk_size):
        rows = slice(start, min(start + chunk_size, num_rows))
        missing = chunk_size - (rows.stop - rows.start)
        tile = hidden[rows]
        yield rows, torch.nn.functional.pad(tile, (0, 0, 0, missing)) if missing else tile
