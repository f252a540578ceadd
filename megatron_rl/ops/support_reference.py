"""The building blocks of the search for the support, in plain torch.

csrc/support.cpp is compared with `histogram` and `keep`, which also run on a CUDA device. The other
functions work on a few numbers per row.

A key is an integer with the order of the logits: the bits of a 16-bit logit, or of
y = logit / temperature in float32 (several float32 logits may share a y, and the sampler sees only
y). The sign bit of a positive number is flipped, and all bits of a negative one. Equal numbers have
equal keys; -0 has the key of 0.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.ops.arithmetic import (
    CHUNK_ELEMENTS,
    LARGEST_LOGIT,
    LOG2E,
    MAGIC,
    REACH,
    multiply_add,
    scaled,
    term,
)

NUM_BINS = 256
MASS_UNIT = 2.0**40  # masses are integers, so the order of summation does not matter
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def key_bits(dtype: torch.dtype) -> int:
    """Bits of a key: 16 or 32."""
    return 8 * dtype.itemsize


def keys(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """int64 keys of logits of any shape, in float32, bfloat16 or float16."""
    if logits.dtype == torch.float32:
        logits = scaled(logits, temperature)
    half = 1 << (key_bits(logits.dtype) - 1)
    bits = logits.contiguous().view(INTEGERS[logits.dtype]).long()
    bits = torch.where(bits == -half, 0, bits)
    return torch.where(bits < 0, ~bits, bits + half)


def key_of_minus_infinity(dtype: torch.dtype) -> int:
    """The key of -inf, below that of every number."""
    return int(keys(torch.tensor(-math.inf, dtype=dtype), 1.0))


def logits_of(keys: torch.Tensor, dtype: torch.dtype, temperature: float) -> torch.Tensor:
    """The float32 y that each key stands for; the inverse of `keys`."""
    half = 1 << (key_bits(dtype) - 1)
    bits = torch.where(keys >= half, keys - half, ~keys).to(INTEGERS[dtype])
    values = bits.view(dtype)
    return values if dtype == torch.float32 else scaled(values, temperature)


def terms(y: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """exp(y) * 2^-N in float32, where N is the exponent of the row's maximum."""
    raised = maximum.clamp(min=-LARGEST_LOGIT)
    exponent = multiply_add(raised, LOG2E, MAGIC) - MAGIC
    return term(torch.maximum(y, raised - REACH), MAGIC - exponent)


def masses(y: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """int64 round(term * 2^40), ties to even."""
    return (terms(y, maximum).double() * MASS_UNIT).round().long()


def histogram(
    logits: torch.Tensor,
    maximum: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    temperature: float,
    width: int,
    shift: int,
    has_masses: bool,
) -> torch.Tensor:
    """Count the columns whose key is within [low, high], by 8 bits of the key.

    Args:
        logits: [N, V] float32, bfloat16 or float16; columns from `width` on are padding.
        maximum: [N] float32, the largest y of the row over all shards.
        low, high: [N] int64, inclusive; a row with low > high has no columns.
        width: of the shard's columns without padding.
        shift: a column falls into bin `(key >> shift) & 255`.
        has_masses: also sum the masses of the columns.

    Returns:
        [1, N, 256] int64 counts, or [2, N, 256]: counts, then masses.
    """
    num_rows = logits.shape[0]
    result = torch.zeros(
        1 + has_masses, num_rows, NUM_BINS, dtype=torch.int64, device=logits.device
    )
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        shard = logits[rows, :width]
        of_shard = keys(shard, temperature)
        is_in = (of_shard >= low[rows, None]) & (of_shard <= high[rows, None])
        bins = (of_shard >> shift) & (NUM_BINS - 1)
        result[0, rows].scatter_add_(1, bins, is_in.long())
        if has_masses:
            mass = masses(scaled(shard, temperature), maximum[rows, None])
            result[1, rows].scatter_add_(1, bins, torch.where(is_in, mass, 0))
    return result


def keep(
    logits: torch.Tensor,
    edge: torch.Tensor,
    quota: torch.Tensor,
    label_column: torch.Tensor,
    temperature: float,
    width: int,
) -> torch.Tensor:
    """A copy of the logits with -inf outside the support.

    Args:
        logits: [N, V]; columns from `width` on are padding.
        edge: [N] int64 key; columns with a larger key are kept.
        quota: [N] int64: the number of columns to keep among those whose key is the edge, without
            the label; the first ones are kept.
        label_column: [N] int64, the label's column in this shard, which is kept; -1 if the shard
            does not hold the label.
    """
    kept = torch.full_like(logits, -math.inf, memory_format=torch.contiguous_format)
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    columns = torch.arange(width, device=logits.device)
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        shard = logits[rows, :width]
        of_shard = keys(shard, temperature)
        is_label = columns == label_column[rows, None]
        is_tie = (of_shard == edge[rows, None]) & ~is_label
        is_kept = (of_shard > edge[rows, None]) | is_label
        is_kept |= is_tie & (is_tie.cumsum(1) <= quota[rows, None])
        kept[rows, :width] = torch.where(is_kept, shard, -math.inf)
    return kept
