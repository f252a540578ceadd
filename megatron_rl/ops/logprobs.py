"""Logits, or hidden states and the output weight, come in; each label's log-prob goes out.

    y = x / temperature,    logprob = y[label] - log sum exp(y)  over the true vocabulary
    d logprob / d x[j] = ([j == label] - softmax(y)[j]) / temperature

Arithmetic: plain torch. A row is divided by the temperature, compared with its maximum and
exponentiated in float32, and added in torch's own order; what is left of it (one maximum, one sum)
is joined over the ranks and finished in float64. The last bits depend on the number of shards, the
device, the CPU's vector width and the torch build.

Collectives: two all-reduces of [N] numbers in the forward pass, however many chunks; none in the
backward pass of `token_logprobs`. Every rank of the group must call with the same labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.errors import ConfigError, DataError, DivergenceError
from megatron_rl.ops.vocab_parallel import (
    VocabShard,
    all_reduce_max,
    all_reduce_sum,
    vocab_shard,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements worked on at once: what a CPU core's cache holds, and small temporaries on a GPU.
CPU_CHUNK_ELEMENTS = 2**18
GPU_CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowStatistics:
    """What the backward pass needs of every row, the same on every rank."""

    maximum: torch.Tensor  # [N] float32, of y over the vocabulary
    total: torch.Tensor  # [N] float64, sum exp(y - maximum)
    logprobs: torch.Tensor  # [N] float64, of the labels
    entropy: torch.Tensor | None  # [N] float64


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Log-prob of one label a row.

    Args:
        logits: [N, V] float32, bfloat16 or float16: this rank's contiguous shard, as wide as every
            other rank's. -inf is allowed (a column that cannot be sampled).
        labels: [N] int64, global token ids, the same on every rank.
        temperature: the sampler's; logits are divided by it in float32.
        vocab_size: V without padded columns, which stand at the global end; None: no padding.
        group: tensor-parallel group over which the vocabulary is sharded, or None.

    Returns:
        [N] float32, the same on every rank. The gradient arrives in the logits' dtype, exactly 0 on
        padded columns and on rows whose incoming gradient is 0; every rank is expected to feed the
        same incoming gradient.

    Raises:
        DataError: a label outside the vocabulary. DivergenceError: a row with NaN, +inf or nothing
            but -inf. Both name the row and are raised on every rank. On a CUDA device nothing waits
            for the check: such a row's log-prob is NaN (`objective.discrepancy.check_logprobs`
            finds it).
        ValueError: shapes or dtypes that do not fit. ConfigError: a temperature of 0 or below.
    """
    logprobs, _ = _from_logits(logits, labels, temperature, vocab_size, group, has_entropy=False)
    return logprobs


def token_logprobs_and_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and beside it every row's entropy in nats, [N] float32, no gradient."""
    return _from_logits(logits, labels, temperature, vocab_size, group, has_entropy=True)


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


def _from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    vocab_size: int | None,
    group: ProcessGroup | None,
    *,
    has_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.dim() != 2:
        raise ValueError(
            f"token_logprobs: expected logits of shape [N, V], got {tuple(logits.shape)}"
        )
    shard = vocab_shard(logits.shape[1], vocab_size, group)
    _check(logits, labels, temperature, shard)
    return _TokenLogprobs.apply(logits, labels, float(temperature), shard, group, has_entropy)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperature, shard, group, has_entropy):
        partial = _PartialStatistics(logits.shape[0], logits.device, has_entropy)
        partial.add(slice(0, logits.shape[0]), logits, labels, temperature, shard)
        rows = partial.join(group)
        ctx.save_for_backward(logits, labels, rows.maximum, rows.total, rows.logprobs)
        ctx.temperature, ctx.shard = temperature, shard
        entropy = rows.entropy.float() if has_entropy else rows.logprobs.new_empty(0).float()
        ctx.mark_non_differentiable(entropy)
        return rows.logprobs.float(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, _grad_entropy):
        logits, labels, maximum, total, logprobs = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        _write_logits_gradient(
            grad_logits,
            logits,
            labels,
            grad_logprobs,
            maximum,
            total,
            logprobs,
            ctx.temperature,
            ctx.shard,
        )
        return grad_logits, None, None, None, None, None


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, shard, group, chunk_size):
        partial = _PartialStatistics(hidden.shape[0], hidden.device, has_entropy=False)
        for rows, padded_hidden in _row_tiles(hidden, chunk_size):
            logits = (padded_hidden @ weight.T)[: rows.stop - rows.start]
            partial.add(rows, logits, labels[rows], temperature, shard)
        statistics = partial.join(group)
        ctx.save_for_backward(
            hidden, weight, labels, statistics.maximum, statistics.total, statistics.logprobs
        )
        ctx.temperature, ctx.shard = temperature, shard
        ctx.group, ctx.chunk_size = group, chunk_size
        return statistics.logprobs.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs):
        hidden, weight, labels, maximum, total, logprobs = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows, padded_hidden in _row_tiles(hidden, ctx.chunk_size):
            logits = padded_hidden @ weight.T
            num_rows = rows.stop - rows.start
            _write_logits_gradient(
                logits[:num_rows],
                logits[:num_rows],
                labels[rows],
                grad_logprobs[rows],
                maximum[rows],
                total[rows],
                logprobs[rows],
                ctx.temperature,
                ctx.shard,
            )
            logits[num_rows:] = 0.0
            grad_hidden[rows] = (logits @ weight)[:num_rows]
            grad_weight += logits.T @ padded_hidden
        all_reduce_sum(grad_hidden, ctx.group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), *([None] * 5)


class _PartialStatistics:
    """Maximum and sums of this rank's columns, filled by chunks, joined over ranks once."""

    def __init__(self, num_rows: int, device: torch.device, has_entropy: bool) -> None:
        self.has_entropy = has_entropy
        self.maximum = torch.full((num_rows,), -math.inf, dtype=torch.float32, device=device)
        # sum e, y[label], and for the entropy sum e * z, with z = y - maximum and e = exp(z).
        self.sums = torch.zeros(
            3 if has_entropy else 2, num_rows, dtype=torch.float64, device=device
        )

    def add(
        self,
        rows: slice,
        logits: torch.Tensor,
        labels: torch.Tensor,
        temperature: float,
        shard: VocabShard,
    ) -> None:
        """Take in logits [n, V] and labels [n], which are the rows `rows` of the whole."""
        if shard.width == 0 or logits.shape[0] == 0:
            return
        maximum, sums = self.maximum[rows], self.sums[:, rows]
        column, is_local = shard.locate(labels)
        label_logits = logits.gather(1, column[:, None])[:, 0].float()
        if temperature != 1.0:
            label_logits /= _divisor(temperature, logits.device)
        sums[1] = torch.where(is_local, label_logits, 0.0)
        chunks = _row_chunks(logits.shape[0], shard.width, logits.device)
        work, *weighted = _scratch(chunks, shard.width, logits.device, 1 + self.has_entropy)
        for chunk in chunks:
            z = _scaled(logits[chunk, : shard.width], temperature, work)
            torch.amax(z, dim=1, out=maximum[chunk])
            # A shard may hold -inf only: measured against 0 its sum is a sound 0.
            z -= torch.where(maximum[chunk].isneginf(), 0.0, maximum[chunk])[:, None]
            if self.has_entropy:
                z.clamp_(min=-150.0)  # exp of it is 0, and 0 * z stays 0, which 0 * -inf is not
                e = torch.exp(z, out=weighted[0][: z.shape[0]])
                sums[0, chunk] = e.sum(dim=1).double()
                sums[2, chunk] = e.mul_(z).sum(dim=1).double()
            else:
                sums[0, chunk] = z.exp_().sum(dim=1).double()

    def join(self, group: ProcessGroup | None) -> _RowStatistics:
        """Two all-reduces, unconditional; then every rank finishes the same numbers in float64."""
        local = self.maximum
        # A broken row is +inf from here on, so that every rank sees it and none waits for another.
        local = torch.where(local.isnan(), math.inf, local)
        maximum = all_reduce_max(local.clone(), group)
        is_broken = maximum.isinf()
        if maximum.device.type == "cpu" and bool(is_broken.any()):
            row = int(is_broken.int().argmax())
            found = "nothing but -inf" if maximum[row] < 0 else "NaN or +inf"
            raise DivergenceError(
                f"logits of row {row}: expected numbers and -inf, with at least one number, got "
                f"{found} ({int(is_broken.sum())} of {maximum.numel()} rows are broken); "
                "look for NaN in the weights and the hidden states"
            )
        is_empty = local.isneginf()
        shift = torch.where(is_empty, 0.0, local.double() - maximum.double())
        scale = torch.where(is_empty, 0.0, shift.exp())
        if self.has_entropy:
            self.sums[2] = scale * (self.sums[2] + shift * self.sums[0])
        self.sums[0] *= scale
        sums = all_reduce_sum(self.sums, group)
        total, label_logits = sums[0], sums[1]
        log_total = total.log()
        logprobs = (label_logits - maximum.double() - log_total).clamp(max=0.0)
        logprobs = torch.where(is_broken, math.nan, logprobs)
        entropy = (log_total - sums[2] / total).clamp(min=0.0) if self.has_entropy else None
        return _RowStatistics(maximum=maximum, total=total, logprobs=logprobs, entropy=entropy)


def _write_logits_gradient(
    grad_logits: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    grad_logprobs: torch.Tensor,
    maximum: torch.Tensor,
    total: torch.Tensor,
    logprobs: torch.Tensor,
    temperature: float,
    shard: VocabShard,
) -> None:
    """Fill grad_logits [N, V] with `(onehot - softmax) * grad / temperature`.

    It may be `logits` itself, which is then written over.
    """
    if logits.shape[0] == 0:
        return
    scaled = grad_logprobs.double() / temperature
    # 0 - ... gives +0, not -0, where the incoming gradient is 0.
    factor = (0.0 - scaled / total).float()[:, None]
    # The label's own column, g * (1 - p), is rounded to the logits' dtype once, as the others are.
    at_label = (scaled * (1.0 - logprobs.exp()) + 0.0).to(grad_logits.dtype)[:, None]
    column, is_local = shard.locate(labels)
    chunks = _row_chunks(logits.shape[0], shard.width, logits.device)
    (work,) = _scratch(chunks, shard.width, logits.device, 1)
    for chunk in chunks:
        target = grad_logits[chunk]
        p = _scaled(logits[chunk, : shard.width], temperature, work)
        p.sub_(maximum[chunk, None]).exp_().mul_(factor[chunk])
        target[:, : shard.width] = p
        target[:, shard.width :] = 0.0
        kept = target.gather(1, column[chunk, None])
        target.scatter_(
            1,
            column[chunk, None],
            torch.where(is_local[chunk, None], at_label[chunk], kept),
        )


def _divisor(temperature: float, device: torch.device) -> torch.Tensor:
    # A tensor on the device: by a Python number, CUDA multiplies with its rounded reciprocal.
    return torch.full((), temperature, dtype=torch.float32, device=device)


def _scaled(logits: torch.Tensor, temperature: float, work: torch.Tensor) -> torch.Tensor:
    """`logits / temperature` in float32, in the first rows of `work`."""
    y = work[: logits.shape[0]].copy_(logits)
    return y if temperature == 1.0 else y.div_(_divisor(temperature, logits.device))


def _row_chunks(num_rows: int, width: int, device: torch.device) -> list[slice]:
    elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
    step = max(1, elements // max(width, 1))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _scratch(
    chunks: list[slice], width: int, device: torch.device, num_buffers: int
) -> list[torch.Tensor]:
    """Buffers of one chunk, used again and again: fresh ones made a CPU pass three times slower."""
    num_rows = chunks[0].stop - chunks[0].start
    return [torch.empty(num_rows, width, device=device) for _ in range(num_buffers)]


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
