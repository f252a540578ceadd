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

from megatron_rl.errors import ConfigError, DataError, DivergenceError
from megatron_rl.ops import kernels
from megatron_rl.ops.node_layout import words_per_row
from megatron_rl.ops.reference import LARGEST_LOGIT
from megatron_rl.ops.vocab_parallel import VocabShard, all_reduce_sum, gather_rows, vocab_shard

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
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
        overwrite_logits: the backward pass writes the gradient over the logits instead of into new
            memory. Nothing else may need them then; a second backward pass raises RuntimeError.

    Returns:
        [N] float32, never above 0, the same on every rank. The gradient arrives in the logits'
        dtype, rounded once, +0 on padded columns and on rows whose incoming gradient is 0; every
        rank is expected to feed the same incoming gradient.

    Raises:
        DataError: a label outside the vocabulary. DivergenceError: a row with NaN or +inf, or whose
            largest logit lies outside +-2^21 after division by the temperature (nothing but -inf,
            too). Both name the row and are raised on every rank. On a CUDA device nothing waits for
            the check: such a row's log-prob is NaN, and that is the flag which
            `objective.discrepancy.check_logprobs` reads before it enters a loss.
        ValueError: shapes or dtypes that do not fit. ConfigError: a temperature of 0 or below,
            or a native extension that is not built.
    """
    shard = _shard_of(logits, labels, temperature, vocab_size, group)
    logprobs, _ = _TokenLogprobs.apply(
        logits, labels, float(temperature), shard, group, False, overwrite_logits
    )
    return logprobs


def token_logprobs_and_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    overwrite_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and beside it every row's entropy in nats, [N] float32, never below 0, no
    gradient.
    """
    shard = _shard_of(logits, labels, temperature, vocab_size, group)
    return _TokenLogprobs.apply(
        logits, labels, float(temperature), shard, group, True, overwrite_logits
    )


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """`token_logprobs(hidden @ weight.T, labels)` with `chunk_size` rows of logits at a time.

    The backward pass computes each chunk's logits again. Every product has `chunk_size` rows, the
    last one filled up with zeros, because a product's bits depend on its number of rows.

    Args:
        hidden: [N, H] float32, bfloat16 or float16, the same on every rank of the group.
        weight: [V, H], hidden's dtype: this rank's shard of the output layer.
        labels, temperature, vocab_size, group: as for `token_logprobs`.
        chunk_size: rows of logits at a time, at least 1.

    Returns:
        [N] float32. The gradient of `hidden` is already summed over the group (one all-reduce, in
        float32), so the caller must not reduce it again; that of `weight` is this rank's shard,
        accumulated in float32.

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
    shard = vocab_shard(weight.shape[0], vocab_size, group)
    _check(hidden, labels, temperature, shard)
    return _LinearTokenLogprobs.apply(
        hidden, weight, labels, float(temperature), shard, group, chunk_size
    )


def _shard_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    vocab_size: int | None,
    group: ProcessGroup | None,
) -> VocabShard:
    if logits.dim() != 2:
        raise ValueError(
            f"token_logprobs: expected logits of shape [N, V], got {tuple(logits.shape)}"
        )
    shard = vocab_shard(logits.shape[1], vocab_size, group)
    _check(logits, labels, temperature, shard)
    return shard


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperature, shard, group, has_entropy, overwrite_logits):
        words = kernels.nodes(
            logits, labels, temperature, shard.edges, shard.rank, shard.vocab_size, has_entropy
        )
        logprobs, entropy, exponent, total = _finish(words, labels, shard, group, has_entropy)
        ctx.save_for_backward(logits, labels, exponent, total)
        ctx.temperature, ctx.shard = temperature, shard
        ctx.overwrite_logits, ctx.is_overwritten = overwrite_logits, False
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, _grad_entropy):
        if ctx.is_overwritten:
            raise RuntimeError(
                "token_logprobs: expected one backward pass with overwrite_logits=True, got a "
                "second one; its logits are gone"
            )
        logits, labels, exponent, total = ctx.saved_tensors
        if ctx.overwrite_logits:
            grad_logits, ctx.is_overwritten = logits.detach(), True
            # Autograd then refuses any other node that saved these logits.
            torch.autograd.graph.increment_version(logits)
        else:
            grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        kernels.gradient(
            logits,
            labels,
            grad_logprobs,
            exponent,
            total,
            ctx.temperature,
            ctx.shard.start,
            ctx.shard.vocab_size,
            grad_logits,
        )
        return grad_logits, *([None] * 6)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, shard, group, chunk_size):
        width = words_per_row(shard.edges, shard.vocab_size, has_entropy=False)
        words = torch.empty(hidden.shape[0], width, dtype=torch.int32, device=hidden.device)
        for rows, padded_hidden in _row_tiles(hidden, chunk_size):
            logits = (padded_hidden @ weight.T)[: rows.stop - rows.start]
            words[rows] = kernels.nodes(
                logits, labels[rows], temperature, shard.edges, shard.rank, shard.vocab_size, False
            )
        logprobs, _, exponent, total = _finish(words, labels, shard, group, False)
        ctx.save_for_backward(hidden, weight, labels, exponent, total)
        ctx.temperature, ctx.shard = temperature, shard
        ctx.group, ctx.chunk_size = group, chunk_size
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs):
        hidden, weight, labels, exponent, total = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows, padded_hidden in _row_tiles(hidden, ctx.chunk_size):
            logits = padded_hidden @ weight.T
            num_rows = rows.stop - rows.start
            kernels.gradient(
                logits[:num_rows],
                labels[rows],
                grad_logprobs[rows],
                exponent[rows],
                total[rows],
                ctx.temperature,
                ctx.shard.start,
                ctx.shard.vocab_size,
                logits[:num_rows],
            )
            logits[num_rows:] = 0.0
            grad_hidden[rows] = (logits @ weight)[:num_rows]
            grad_weight += logits.T @ padded_hidden
        all_reduce_sum(grad_hidden, ctx.group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), *([None] * 5)


def _finish(
    words: torch.Tensor,
    labels: torch.Tensor,
    shard: VocabShard,
    group: ProcessGroup | None,
    has_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather the nodes of all ranks and finish: log-probs, entropy, N and S of the roots."""
    gathered = gather_rows(words, group)
    logprobs, entropy, exponent, total, maximum = kernels.finish(
        gathered, labels, shard.edges, shard.vocab_size, has_entropy
    )
    if maximum.device.type == "cpu":
        is_broken = ~(maximum.abs() <= LARGEST_LOGIT)
        if bool(is_broken.any()):
            row = int(is_broken.int().argmax())
            raise DivergenceError(_broken_row(row, float(maximum[row]), is_broken))
    return logprobs, entropy, exponent, total


def _broken_row(row: int, maximum: float, is_broken: torch.Tensor) -> str:
    if math.isnan(maximum) or maximum == math.inf:
        found = "NaN or +inf"
    elif maximum == -math.inf:
        found = "nothing but -inf"
    else:
        found = f"a largest one of {maximum:g} after division by the temperature"
    return (
        f"logits of row {row}: expected numbers and -inf, the largest within "
        f"+-{LARGEST_LOGIT:.0f}, got {found} ({int(is_broken.sum())} of {is_broken.numel()} rows "
        "are broken); look for NaN in the weights and the hidden states"
    )


def _row_tiles(hidden: torch.Tensor, chunk_size: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Tiles of exactly `chunk_size` rows, the last one filled up with zeros."""
    num_rows = hidden.shape[0]
    for start in range(0, num_rows, chunk_size):
        rows = slice(start, min(start + chunk_size, num_rows))
        missing = chunk_size - (rows.stop - rows.start)
        tile = hidden[rows]
        yield rows, torch.nn.functional.pad(tile, (0, 0, 0, missing)) if missing else tile


def _check(rows: torch.Tensor, labels: torch.Tensor, temperature: float, shard: VocabShard) -> None:
    if rows.dtype not in DTYPES:
        raise ValueError(f"token_logprobs: expected float32, bfloat16 or float16, got {rows.dtype}")
    if labels.shape != rows.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"token_logprobs: expected labels [{rows.shape[0]}] int64, "
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
