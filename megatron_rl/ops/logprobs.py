"""Logits, or hidden states and the output weight, come in; each label's log-prob goes out.

    y = x / temperature,    logprob = y[label] - log sum exp(y)  over the true vocabulary
    d logprob / d x[j] = ([j == label] - softmax(y)[j]) / temperature

Arithmetic: one order of rounded steps, written out in `reference.py` and followed by every kernel.
The same logits give the same bits: whatever the number of shards and their padding, the batch and
its order, the threads, the device and its vector width. Error: at most 5e-7 x max(1, |logprob|)
against float64. The matrix product of `linear_token_logprobs` has bits of its own.

`kernels.py` says what computes: on the CPU the C++ kernels, on a CUDA device the CUDA kernels, or,
in a build without them, `reference.py`, the same steps in torch operations and much slower.

Collectives: one all-gather of a few dozen int32 a row in the forward pass, however many chunks;
none in the backward pass of `token_logprobs`. Every rank of the group must call with the same
labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.ops import kernels
from megatron_rl.ops.broken_rows import flag_of, raise_if_broken
from megatron_rl.ops.node_layout import words_per_row
from megatron_rl.ops.vocab_parallel import (
    VocabShard,
    all_reduce_sum,
    gather_rows,
    reduce_scatter_rows,
    vocab_shard,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """Log-prob of one label a row.

    Args:
        logits: [N, V] float32, bfloat16 or float16: this rank's contiguous shard, as wide as every
            other rank's. -inf is allowed (a column that cannot be sampled).
        labels: [N] int64, global token ids, the same on every rank.
        temperature: the sampler's; logits are divided by it in float32.
        vocab_size: V without padded columns, which stand at the global end; None: no padding.
        group: tensor-parallel group over which the vocabulary is sharded, or None.
        ignore_index: rows with this label give 0 and take no gradient, and logits there may hold
            anything.
        overwrite_logits: the backward pass writes the gradient over the logits instead of into
            memory of its own (on the CPU, one gradient's of at most 512 MiB is kept for the next
            one). Nothing else may need them then; a second backward pass raises RuntimeError.

    Returns:
        [N] float32, never above 0, the same on every rank. The gradient arrives in the logits'
        dtype, rounded once, +0 on padded columns and on rows whose incoming gradient is 0; every
        rank is expected to feed the same incoming gradient.

    Raises:
        DataError: a label outside the vocabulary. DivergenceError: a row with NaN or +inf, or whose
            largest logit lies outside +-2^21 after division by the temperature (nothing but -inf,
            too). Both name the row and are raised on every rank: at once on the CPU; on a CUDA
            device, where nothing waits for them and the row's log-prob is NaN, by the next
            `broken_rows.check_broken_rows`.
        ValueError: shapes or dtypes that do not fit. ConfigError: a temperature of 0 or below,
            or a native extension that is not built.
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
    """`token_logprobs`, and beside it every row's entropy in nats, [N] float32, never below 0, no
    gradient; 0 where the label is ignored.
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
    """`token_logprobs(hidden @ weight.T, labels)` with `chunk_size` rows of logits at a time.

    The backward pass computes each chunk's logits again. Every product has `chunk_size` rows, the
    last one filled up with zeros, because a product's bits depend on its number of rows.

    Args:
        hidden: [N, H] float32, bfloat16 or float16, the same on every rank of the group; with
            sequence_parallel this rank's [N / TP, H] of it, in order of rank.
        weight: [V, H], hidden's dtype: this rank's shard of the output layer.
        labels, temperature, vocab_size, group, ignore_index: as for `token_logprobs`.
        chunk_size: rows of logits at a time, at least 1.
        sequence_parallel: the ranks of the group hold equally many consecutive rows of hidden
            each, which are gathered here, in both passes.

    Returns:
        [N] float32. The gradient of `hidden` is already summed over the group (one all-reduce, or
        reduce-scatter, in float32), so the caller must not reduce it again; that of `weight` is
        this rank's shard, accumulated in float32.

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
    _check(hidden.dtype, num_rows, labels, temperature, shard)
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


def without_ignored(
    labels: torch.Tensor, ignore_index: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Labels that are all within the vocabulary, and which rows count; None: all of them."""
    if ignore_index is None:
        return labels, None
    is_counted = labels != ignore_index
    return torch.where(is_counted, labels, 0), is_counted


def shard_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    vocab_size: int | None,
    group: ProcessGroup | None,
) -> VocabShard:
    """This rank's share of the vocabulary, once what was given is checked."""
    if logits.dim() != 2:
        raise ValueError(
            f"token_logprobs: expected logits of shape [N, V], got {tuple(logits.shape)}"
        )
    shard = vocab_shard(logits.shape[1], vocab_size, group)
    _check(logits.dtype, logits.shape[0], labels, temperature, shard)
    return shard


class TokenLogprobs(torch.autograd.Function):
    """Log-probs, entropy, and the largest y of every row; only the first has a gradient."""

    @staticmethod
    def forward(
        ctx, logits, labels, is_counted, temperature, shard, group, has_entropy, overwrite_logits
    ):
        words = kernels.nodes(
            logits, labels, temperature, shard.edges, shard.rank, shard.vocab_size, has_entropy
        )
        logprobs, entropy, exponent, total, maximum = _finish(
            words, labels, is_counted, shard, group, has_entropy
        )
        ctx.save_for_backward(logits, labels, is_counted, exponent, total)
        ctx.temperature, ctx.shard = temperature, shard
        ctx.overwrite_logits, ctx.is_overwritten = overwrite_logits, False
        ctx.mark_non_differentiable(entropy, maximum)
        return logprobs, entropy, maximum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, _grad_entropy, _grad_maximum):
        if ctx.is_overwritten:
            raise RuntimeError(
                "token_logprobs: expected one backward pass with overwrite_logits=True, got a "
                "second one; its logits are gone"
            )
        logits, labels, is_counted, exponent, total = ctx.saved_tensors
        if ctx.overwrite_logits:
            grad_logits, ctx.is_overwritten = logits.detach(), True
            # Autograd then refuses any other node that saved these logits.
            torch.autograd.graph.increment_version(logits)
        else:
            grad_logits = kernels.empty_like(logits)
        kernels.gradient(
            logits,
            labels,
            _where_counted(grad_logprobs, is_counted),
            exponent,
            total,
            ctx.temperature,
            ctx.shard.start,
            ctx.shard.vocab_size,
            grad_logits,
        )
        return grad_logits, *([None] * 7)


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
        logprobs, _, ctx.exponent, ctx.total, _ = _finish(
            words, labels, is_counted, shard, group, False
        )
        ctx.temperature, ctx.shard = temperature, shard
        ctx.group, ctx.chunk_size = group, chunk_size
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs):
        hidden, weight, labels, is_counted = ctx.saved_tensors
        grad_logprobs = _where_counted(grad_logprobs, is_counted)
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


def _where_counted(values: torch.Tensor, is_counted: torch.Tensor | None) -> torch.Tensor:
    """0 in ignored rows."""
    return values if is_counted is None else torch.where(is_counted, values, 0.0)


def _finish(
    words: torch.Tensor,
    labels: torch.Tensor,
    is_counted: torch.Tensor | None,
    shard: VocabShard,
    group: ProcessGroup | None,
    has_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather the nodes of all ranks and finish: log-probs, entropy, N and S of the roots, and the
    largest y.
    """
    gathered = gather_rows(words, group)
    flag = flag_of(words.device) if words.device.type == "cuda" else None
    logprobs, entropy, exponent, total, maximum = kernels.finish(
        gathered, labels, is_counted, shard.edges, shard.vocab_size, has_entropy, flag
    )
    if maximum.device.type == "cpu":
        raise_if_broken(maximum, is_counted)
    logprobs = _where_counted(logprobs, is_counted)
    entropy = _where_counted(entropy, is_counted) if has_entropy else entropy
    return logprobs, entropy, exponent, total, maximum


def _row_tiles(hidden: torch.Tensor, chunk_size: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Tiles of exactly `chunk_size` rows, the last one filled up with zeros."""
    num_rows = hidden.shape[0]
    for start in range(0, num_rows, chunk_size):
        rows = slice(start, min(start + chunk_size, num_rows))
        missing = chunk_size - (rows.stop - rows.start)
        tile = hidden[rows]
        yield rows, torch.nn.functional.pad(tile, (0, 0, 0, missing)) if missing else tile


def _check(
    dtype: torch.dtype, num_rows: int, labels: torch.Tensor, temperature: float, shard: VocabShard
) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"token_logprobs: expected float32, bfloat16 or float16, got {dtype}")
    if labels.shape != (num_rows,) or labels.dtype != torch.int64:
        raise ValueError(
            f"token_logprobs: expected labels [{num_rows}] int64, "
            f"got {tuple(labels.shape)} {labels.dtype}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(
            f"temperature: expected a finite number above 0, got {temperature}; "
            "change rollout.sampling.temperature"
        )
    if labels.device.type != "cpu":
        return
    is_outside = (labels < 0) | (labels >= shard.vocab_size)
    if bool(is_outside.any()):
        row = int(is_outside.int().argmax())
        raise DataError(
            f"label of row {row}: expected a token id of 0 to {shard.vocab_size - 1}, "
            f"got {int(labels[row])}; do tokenizer and model have the same vocabulary?"
        )
