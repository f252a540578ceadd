"""Rows of logits, sharded over the vocabulary: their sums, and their gradient.

In come this rank's columns; out go the maximum and the sum of exponentials of every row over the
whole vocabulary, the label's log-prob and the entropy, the same on every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_rl.errors import DivergenceError
from megatron_rl.ops.vocab_parallel import VocabShard, all_reduce_max, all_reduce_sum

# Elements worked on at once: what a CPU core's cache holds, and small temporaries on a GPU.
CPU_CHUNK_ELEMENTS = 2**18
GPU_CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """What the backward pass needs of every row, the same on every rank."""

    maximum: torch.Tensor  # [N] float32, of y over the vocabulary
    total: torch.Tensor  # [N] float64, sum exp(y - maximum)
    logprobs: torch.Tensor  # [N] float64, of the labels
    entropy: torch.Tensor | None  # [N] float64


class PartialStatistics:
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
        work = _scratch(chunks, shard.width, logits.device)
        weighted = torch.zeros_like(work) if self.has_entropy else work
        for chunk in chunks:
            z = _scaled(logits[chunk, : shard.width], temperature, work)
            torch.amax(z, dim=1, out=maximum[chunk])
            # A shard may hold -inf only: measured against 0 its sum is a sound 0.
            z -= torch.where(maximum[chunk].isneginf(), 0.0, maximum[chunk])[:, None]
            if self.has_entropy:
                z.clamp_(min=-150.0)  # exp of it is 0, and 0 * z stays 0, which 0 * -inf is not
                e = torch.exp(z, out=weighted[: z.shape[0]])
                sums[0, chunk] = _row_sums(weighted, z.shape[0])
                e.mul_(z)
                sums[2, chunk] = _row_sums(weighted, z.shape[0])
            else:
                z.exp_()
                sums[0, chunk] = _row_sums(work, z.shape[0])

    def join(self, group: ProcessGroup | None) -> RowStatistics:
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
        return RowStatistics(maximum=maximum, total=total, logprobs=logprobs, entropy=entropy)


def write_logits_gradient(
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
    work = _scratch(chunks, shard.width, logits.device)
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
    step = max(2, elements // max(width, 1))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _scratch(chunks: list[slice], width: int, device: torch.device) -> torch.Tensor:
    """A buffer of one chunk, used again and again: fresh ones made it three times slower."""
    num_rows = chunks[0].stop - chunks[0].start
    return torch.zeros(max(num_rows, 2), width, device=device)


def _row_sums(buffer: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Sums of the first rows, [num_rows] float64.

    Of two rows at least: torch adds a single row in as many parts as there are threads, and its
    bits would depend on whether the row stands alone.
    """
    return buffer[: max(num_rows, 2)].sum(dim=1)[:num_rows].double()
