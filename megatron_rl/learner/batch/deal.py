"""Samples of every replica in, each rank's packed rows out; and log-probs of rows back to samples.

Only the heads of the replicas (first rank of TP x PP) hold samples. They redistribute the sequences
among themselves, so that every replica gets about as many tokens; each head then sends its share to
the other ranks of its replica, and all of them pack it in the same way. The number of ranks changes
which rank computes a sequence, but never its mini-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
import torch.distributed as dist

from megatron_rl.learner.batch.packing import deal, fill, pack
from megatron_rl.learner.layout.exchange import exchange, gather_from_all
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.records import MicroBatch, RecomputedRow, RolloutGroup, Sample, TrainBatch


def deal_batch(
    samples: Sequence[Sample],
    parallel: Parallel,
    *,
    samples_per_prompt: int,
    num_mini_batches: int,
    tokens_per_row: int,
) -> TrainBatch:
    """Deal and pack one step's samples; a collective over all ranks.

    The groups with a kept sample are numbered by prompt index, over all replicas, and their samples
    are divided into the mini-batches in that order, about as many into each. Samples that are not
    kept stand in rows of their own.

    Args:
        samples: this replica's own, on its head; ignored elsewhere.
    """
    kept = [sample for sample in samples if sample.is_kept]
    slots = _slots(kept, parallel) if parallel.is_replica_head else {}
    num_slots = max(1, len(slots) * samples_per_prompt)
    mini_batches = []
    for number in range(num_mini_batches):
        own = [
            sample
            for sample in kept
            if (slots[sample.prompt_index] * samples_per_prompt + sample.sample_index)
            * num_mini_batches
            // num_slots
            == number
        ]
        dealt = _dealt(own, parallel)
        mini_batches.append(pack_rows(dealt, parallel, tokens_per_row, min_rows=1))
    dropped = _dealt([sample for sample in samples if not sample.is_kept], parallel)
    return TrainBatch(
        mini_batches=tuple(mini_batches),
        dropped=pack_rows(dropped, parallel, tokens_per_row, min_rows=0),
    )


def pack_rows(
    samples: Sequence[Sample], parallel: Parallel, tokens_per_row: int, *, min_rows: int
) -> tuple[MicroBatch, ...]:
    """Rows of this replica's samples, filled up with masked ones to the number of the replica that
    has most; a collective.
    """
    rows = pack(samples, tokens_per_row=tokens_per_row)
    most = torch.tensor([len(rows)], dtype=torch.int64, device=parallel.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=parallel.dp_group)
    filled = fill(rows, max(min_rows, int(most)), tokens_per_row)
    return tuple(to_device(row, parallel.device) for row in filled)


def to_device(row: MicroBatch, device: torch.device) -> MicroBatch:
    """The row with every tensor on the device."""
    fields = {name: getattr(row, name) for name in MicroBatch.__dataclass_fields__}
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in fields.items()
    }
    return MicroBatch(**moved)


def unscored_samples(groups: Iterable[RolloutGroup]) -> list[Sample]:
    """One sample for each rollout of groups of which only the log-probs matter."""
    return [
        Sample(
            prompt_index=group.prompt.index,
            sample_index=index,
            rollout=rollout,
            reward=0.0,
            advantage=0.0,
        )
        for group in groups
        for index, rollout in enumerate(group.rollouts)
    ]


def by_sample(rows: Iterable[RecomputedRow]) -> list[tuple[Sample, torch.Tensor]]:
    """Each sample of the rows with its recomputed log-probs, as `split_by_sample` gives them."""
    return [
        pair for row in rows for pair in split_by_sample(row.micro_batch, row.recomputed_logprobs)
    ]


def split_by_sample(
    micro_batch: MicroBatch, values: torch.Tensor
) -> list[tuple[Sample, torch.Tensor]]:
    """Each sample of a row with its part of the row's values.

    Args:
        values: [T] float32, aligned with the prediction.
    Returns:
        Samples in their order in the row, each with [L] float32 on the CPU, aligned with its own
        tokens: 0.0 for the first, which nothing predicts. Nothing for a filler row.
    """
    pairs = []
    # Not strict: there is one start more than there are samples.
    for start, sample in zip(micro_batch.cu_seqlens_padded.tolist(), micro_batch.samples):
        length = len(sample.rollout.token_ids)
        of_tokens = torch.zeros(length)
        of_tokens[1:] = values[start : start + length - 1].cpu()
        pairs.append((sample, of_tokens))
    return pairs


def _slots(kept: Sequence[Sample], parallel: Parallel) -> dict[int, int]:
    """Prompt index to the group's number among all replicas' kept ones."""
    own = sorted({sample.prompt_index for sample in kept})
    of_ranks = gather_from_all(own, parallel.dp_group)
    return {index: number for number, index in enumerate(sorted(chain(*of_ranks)))}


def _dealt(samples: Sequence[Sample], parallel: Parallel) -> list[Sample]:
    """This replica's new share of all replicas' samples, on each of its ranks."""
    dealt = _deal_among_heads(samples, parallel) if parallel.is_replica_head else []
    return parallel.from_replica_head(dealt)


def _deal_among_heads(samples: Sequence[Sample], parallel: Parallel) -> list[Sample]:
    if parallel.dp_size > 1:
        own = [(*_key(sample), len(sample.rollout.token_ids)) for sample in samples]
        # By prompt, so that the result does not depend on which replica holds a sample now.
        of_all = sorted(chain(*gather_from_all(own, parallel.dp_group)))
        by_key = {_key(sample): sample for sample in samples}
        shares = deal([length for *_, length in of_all], parallel.dp_size)
        keys = [[of_all[index][:2] for index in share] for share in shares]
        items_for = [[by_key[key] for key in each if key in by_key] for each in keys]
        samples = exchange(items_for, parallel.dp_group, parallel.device)
    return sorted(samples, key=_key)


def _key(sample: Sample) -> tuple[int, int]:
    return sample.prompt_index, sample.sample_index
