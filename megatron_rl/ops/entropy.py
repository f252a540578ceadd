"""The entropy of every row with a gradient to the logits, which an entropy bonus needs.

    H = -sum p log p,   p = softmax(x / temperature) over the true vocabulary V
    d H / d x[j] = -p[j] (log p[j] + H) / temperature

`token_logprobs_and_entropy` computes the entropy at almost no cost, with bits that do not depend
on the number of shards, but without a gradient. This function reads the logits twice more in the
forward pass and once more in the backward pass, in float32 torch operations on a few rows at a
time. It sums over tensor-parallel ranks in floating point (two all-reduces of [N] numbers in the
forward pass, none in the backward pass), so its bits depend on TP; its error is a few float32
roundings.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.ops import kernels
from megatron_rl.ops.vocab_parallel import VocabShard, all_reduce_max, all_reduce_sum, vocab_shard

MAX_ELEMENTS = 2**22  # of a tile of rows: 16 MiB in float32


def differentiable_entropy(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Entropy of each row's distribution; a collective over `group`.

    Args:
        logits: [N, V] float32, bfloat16 or float16: this rank's contiguous shard, as wide as every
            other rank's; finite, or -inf for a column that cannot be sampled.
        temperature: logits are divided by it in float32; above 0.
        vocab_size: V without the padded columns, which are the last global ones; None: no padding.
        group: tensor-parallel group over which the vocabulary is sharded, or None.

    Returns:
        [N] float32 in nats, the same on every rank. The gradient has the logits' dtype and is 0 on
        padded columns. The incoming gradient must be the same on every rank.

    Raises:
        ValueError: logits that are not [N, V], or a vocabulary that does not fit the shards.
    """
    if logits.dim() != 2:
        raise ValueError(
            f"differentiable_entropy: expected logits of shape [N, V], got {tuple(logits.shape)}"
        )
    shard = vocab_shard(logits.shape[1], vocab_size, group)
    return _Entropy.apply(logits, float(temperature), shard, group)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, temperature, shard, group):
        num_rows = logits.shape[0]
        largest = logits.new_full((num_rows,), -math.inf, dtype=torch.float32)
        for rows in _tiles(logits):
            largest[rows] = _scaled(logits[rows], temperature, shard).amax(-1)
        all_reduce_max(largest, group)
        # Z = sum e^(y - m) and B = sum e^(y - m) (y - m), so that H = log Z - B / Z.
        sums = logits.new_zeros((2, num_rows), dtype=torch.float64)
        for rows in _tiles(logits):
            shifted = _scaled(logits[rows], temperature, shard) - largest[rows, None]
            terms = shifted.exp()
            sums[0, rows] = terms.sum(-1, dtype=torch.float64)
            # The clamp avoids 0 * -inf: a column that cannot be sampled must add 0.
            sums[1, rows] = (terms * shifted.clamp(min=-1e30)).sum(-1, dtype=torch.float64)
        all_reduce_sum(sums, group)
        log_total = sums[0].log()
        entropy = (log_total - sums[1] / sums[0]).clamp(min=0.0)
        ctx.save_for_backward(logits, largest + log_total.float(), entropy.float())
        ctx.temperature, ctx.shard = temperature, shard
        return entropy.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_entropy):
        logits, log_normaliser, entropy = ctx.saved_tensors
        gradient = kernels.empty_like(logits)
        scale = grad_entropy.float() / ctx.temperature
        for rows in _tiles(logits):
            logprobs = (
                _scaled(logits[rows], ctx.temperature, ctx.shard) - log_normaliser[rows, None]
            )
            logprobs = logprobs.clamp(min=-1e30)  # 0 * -inf below would be NaN
            surprise = (logprobs + entropy[rows, None]) * logprobs.exp()
            gradient[rows] = (-scale[rows, None] * surprise).to(logits.dtype)
        return gradient, None, None, None


def _tiles(logits: torch.Tensor) -> list[slice]:
    height = max(1, MAX_ELEMENTS // max(1, logits.shape[1]))
    return [slice(start, start + height) for start in range(0, logits.shape[0], height)]


def _scaled(logits: torch.Tensor, temperature: float, shard: VocabShard) -> torch.Tensor:
    """y in float32, with -inf on padded columns."""
    scaled = logits.float() / temperature
    num_true = min(max(shard.vocab_size - shard.start, 0), logits.shape[1])
    if num_true < logits.shape[1]:
        scaled[:, num_true:] = -math.inf
    return scaled
