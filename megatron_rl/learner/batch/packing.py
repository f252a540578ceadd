"""Packs samples into rows for the learner. The functions are pure, so ranks that get the same
samples compute the same rows.

`deal` distributes sequences over data-parallel ranks by cost (longest processing time first,
Graham 1969), `pack` fills rows up to a token budget (first fit decreasing), and `fill` adds
fully masked rows until every rank has the same number. Labels are shifted here and nowhere else:
position t of a row predicts the sequence's token t+1, and every other tensor is aligned with that
prediction.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_rl.errors import DataError
from megatron_rl.records import MicroBatch, Sample

# Rows of few different lengths: products of these sizes are fast on every device, and an allocator
# that caches blocks by size finds them again.
ROW_MULTIPLE = 64


def sequence_cost(length: int, attention_length: float) -> float:
    """What a sequence costs a learner, in tokens: `L + L^2 / attention_length`.

    Args:
        attention_length: of `Geometry.attention_length`; infinity: attention costs nothing.
    """
    return length + length * length / attention_length


def deal(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Distribute sequences so that the ranks get about the same cost.

    Sequences are assigned in order of decreasing cost, each to the rank with the least so far. A
    tie is resolved in favour of the lowest rank; sequences of equal cost keep their order.

    Args:
        costs: of each sequence, such as its number of tokens or its `sequence_cost`.
    Returns:
        For each rank the indices of its sequences, ascending. Every index occurs once; a rank may
        have none.
    Raises:
        ValueError: `num_ranks` is below 1.
    """
    if num_ranks < 1:
        raise ValueError(f"expected at least 1 rank, got {num_ranks}")
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]  # a heap: least cost, then lowest rank
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]


def pack(
    samples: Sequence[Sample],
    *,
    tokens_per_row: int,
    min_size: int = 0,
    multiple: int = 1,
    sequence_multiple: int = 1,
) -> list[MicroBatch]:
    """Pack whole sequences into rows of at most `tokens_per_row` positions, the longest first, each
    into the first row with enough space. A row is as long as its sequences need, rounded up to a
    multiple of `ROW_MULTIPLE` and of `multiple`.

    Args:
        tokens_per_row: a multiple of `multiple`. min_size: positions that each row has at least.
        sequence_multiple: each sequence is padded to a multiple of this, which divides `multiple`.
    Returns:
        Rows as described in `MicroBatch`; none if there are no samples. Positions restart at 0 in
        the padding of the row; each token of a sequence carries the sequence's advantage.
    Raises:
        DataError: a sequence is empty or longer than the budget, its fields have different lengths,
            its first token was sampled by the policy, or some sequences have heads and others have
            none or smaller ones.
    """
    lengths = [
        padded_length(_checked_length(sample, tokens_per_row), sequence_multiple)
        for sample in samples
    ]
    return [
        _row([samples[index] for index in row], max(size, min_size), sequence_multiple)
        for row, size in _fit_rows(lengths, tokens_per_row, multiple)
    ]


def largest_size(lengths: Sequence[int], tokens_per_row: int, multiple: int = 1) -> int:
    """Positions of the longest row that `pack` makes of sequences of these lengths; 0 for none."""
    return max((size for _, size in _fit_rows(lengths, tokens_per_row, multiple)), default=0)


def padded_length(length: int, multiple: int) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple


def row_size(num_tokens: int, tokens_per_row: int, multiple: int = 1) -> int:
    """The positions of a row that holds `num_tokens`: the next multiple of `ROW_MULTIPLE` and
    `multiple`, and at most `tokens_per_row`.
    """
    multiple = math.lcm(ROW_MULTIPLE, multiple)
    return min(tokens_per_row, padded_length(max(num_tokens, 1), multiple))


def _fit_rows(
    lengths: Sequence[int], tokens_per_row: int, multiple: int
) -> list[tuple[list[int], int]]:
    """For each row the indices of its sequences, and its positions."""
    rows: list[list[int]] = []
    space: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        number = next((n for n, left in enumerate(space) if left >= length), len(rows))
        if number == len(rows):
            rows.append([])
            space.append(tokens_per_row)
        rows[number].append(index)
        space[number] -= length
    sizes = [row_size(tokens_per_row - left, tokens_per_row, multiple) for left in space]
    return list(zip(rows, sizes, strict=True))


def empty_micro_batch(tokens_per_row: int) -> MicroBatch:
    """A fully masked row: one sequence of one token, padded to the whole row.

    The sequence has one token instead of filling the row, so that attention costs nothing. There is
    one sequence instead of none, so that no kernel or indexing operation gets an empty list.
    """
    nothing = torch.zeros(tokens_per_row, dtype=torch.int64)
    return MicroBatch(
        tokens=nothing,
        labels=nothing.clone(),
        positions=torch.arange(tokens_per_row),
        loss_mask=torch.zeros(tokens_per_row, dtype=torch.bool),
        rollout_logprobs=torch.zeros(tokens_per_row),
        advantages=torch.zeros(tokens_per_row),
        weight_versions=torch.full((tokens_per_row,), -1),
        sequence_ids=torch.tensor([0] + [-1] * (tokens_per_row - 1)),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        cu_seqlens_padded=torch.tensor([0, tokens_per_row], dtype=torch.int32),
        samples=(),
    )


def fill(micro_batches: Sequence[MicroBatch], num: int, tokens_per_row: int) -> list[MicroBatch]:
    """Append fully masked rows to `micro_batches` until there are `num`, so that every rank has the
    same number.

    Raises:
        ValueError: there are more than `num` rows already.
    """
    if len(micro_batches) > num:
        raise ValueError(f"expected at most {num} micro-batches, got {len(micro_batches)}")
    missing = num - len(micro_batches)
    return [*micro_batches, *(empty_micro_batch(tokens_per_row) for _ in range(missing))]


def _checked_length(sample: Sample, tokens_per_row: int) -> int:
    rollout = sample.rollout
    length = len(rollout.token_ids)
    where = f"prompt {sample.prompt_index}, sample {sample.sample_index}"
    fields = (rollout.loss_mask, rollout.rollout_logprobs, rollout.weight_versions)
    if length == 0 or any(len(values) != length for values in fields):
        raise DataError(
            f"{where}: expected as many mask, log-prob and version entries as tokens (at least "
            f"1), got {length} tokens and {', '.join(str(len(values)) for values in fields)}"
        )
    if rollout.loss_mask[0]:
        raise DataError(
            f"{where}: expected a first token from the prompt, got one that the policy sampled"
        )
    if length > tokens_per_row:
        raise DataError(
            f"{where}: expected a sequence of at most {tokens_per_row} tokens, got {length}: raise "
            "learner.tokens_per_micro_batch, or lower rollout.sampling.max_tokens"
        )
    return length


def _row(samples: Sequence[Sample], size: int, sequence_multiple: int) -> MicroBatch:
    tokens, labels = np.zeros(size, np.int64), np.zeros(size, np.int64)
    positions, loss_mask = np.zeros(size, np.int64), np.zeros(size, np.bool_)
    rollout_logprobs, advantages = np.zeros(size, np.float32), np.zeros(size, np.float32)
    weight_versions, sequence_ids = np.full(size, -1, np.int64), np.full(size, -1, np.int64)
    starts, ends = [0], [0]
    for number, sample in enumerate(samples):
        rollout, start = sample.rollout, starts[-1]
        end = start + len(rollout.token_ids)
        tokens[start:end] = rollout.token_ids
        next_start = start + padded_length(end - start, sequence_multiple)
        positions[start:next_start] = np.arange(next_start - start)
        advantages[start:end] = sample.advantage
        sequence_ids[start:end] = number
        # The last token predicts nothing, because the next position belongs to another sequence.
        labels[start : end - 1] = rollout.token_ids[1:]
        loss_mask[start : end - 1] = rollout.loss_mask[1:]
        rollout_logprobs[start : end - 1] = rollout.rollout_logprobs[1:]
        weight_versions[start : end - 1] = rollout.weight_versions[1:]
        starts.append(next_start)
        ends.append(ends[-1] + end - start)
    positions[starts[-1] :] = np.arange(size - starts[-1])
    is_sampled = torch.from_numpy(loss_mask)
    head_ids, head_logprobs = _heads(samples, is_sampled)
    routes = _routes(samples, starts, size)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        loss_mask=is_sampled,
        rollout_logprobs=torch.from_numpy(rollout_logprobs),
        advantages=torch.from_numpy(advantages),
        weight_versions=torch.from_numpy(weight_versions),
        sequence_ids=torch.from_numpy(sequence_ids),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        cu_seqlens_padded=torch.tensor(starts, dtype=torch.int32),
        samples=tuple(samples),
        head_ids=head_ids,
        rollout_head_logprobs=head_logprobs,
        routes=routes,
    )


def _routes(samples: Sequence[Sample], starts: Sequence[int], size: int) -> torch.Tensor | None:
    """The routes of a row, [T, layers, k] int16, -1 where a rollout has none; None without any.

    Unlike everything else, a route belongs to the token at its position, not to the prediction: it
    is where the hidden state of that token was sent. The engine has none of the last token, which
    it only sampled.
    """
    found = [each.rollout.routes for each in samples if each.rollout.routes is not None]
    if not found:
        return None
    shapes = {routes.shape[1:] for routes in found}
    if len(shapes) > 1:
        raise DataError(
            f"row of prompts {sorted({each.prompt_index for each in samples})}: expected routes of "
            f"one number of layers and experts, got {sorted(shapes)}"
        )
    row = np.full((size, *shapes.pop()), -1, np.int16)
    for start, sample in zip(starts, samples, strict=False):
        routes = sample.rollout.routes
        if routes is not None:
            row[start : start + len(routes)] = routes
    return torch.from_numpy(row)


def _heads(
    samples: Sequence[Sample], is_sampled: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The heads of a row, [T, K] each, absent where `is_sampled` [T] is False; None without heads.

    No sequence begins with a sampled token, so the heads of the samples, one after another, are
    those of the positions of the row at which `is_sampled` is True.
    """
    heads = [each.rollout.head for each in samples if each.rollout.head is not None]
    if not heads:
        return None, None
    sizes = {head.token_ids.shape[1] for head in heads}
    num_tokens = sum(len(head.token_ids) for head in heads)
    if len(sizes) > 1 or num_tokens != int(is_sampled.sum()):
        raise DataError(
            f"row of prompts {sorted({each.prompt_index for each in samples})}: expected heads of "
            f"one size for all of its {int(is_sampled.sum())} response tokens, got heads of "
            f"{sorted(sizes)} tokens for {num_tokens} of them"
        )
    shape = (len(is_sampled), sizes.pop())
    ids = torch.full(shape, -1, dtype=torch.int32)
    logprobs = torch.full(shape, -torch.inf)
    ids[is_sampled] = torch.from_numpy(np.concatenate([head.token_ids for head in heads]))
    logprobs[is_sampled] = torch.from_numpy(np.concatenate([head.logprobs for head in heads]))
    return ids, logprobs
