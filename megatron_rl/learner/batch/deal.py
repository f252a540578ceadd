"""Distributes the samples of all replicas and packs them into each rank's rows; also splits the
log-probs of rows by sample again.

Only the head of each replica (the first of its TP x PP ranks) holds samples. The heads redistribute
the sequences among themselves, so that every replica gets about the same work. Each
head then broadcasts its share within its replica, and all ranks of the replica pack it identically.
The number of ranks affects which rank computes a sequence, but never its mini-batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist

from megatron_rl.learner.batch.packing import (
    deal,
    fill,
    largest_size,
    pack,
    padded_length,
    row_size,
    sequence_cost,
)
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
    attention_length: float = math.inf,
) -> TrainBatch:
    """Distribute and pack one step's samples. A collective over all ranks.

    The groups with a kept sample, of all replicas, are numbered by prompt index. In that order
    their samples are divided into mini-batches of about equal size. Samples that are not kept are
    packed into separate rows, but those of a numbered group are counted in its mini-batch.

    Args:
        samples: this replica's own, read on its head and ignored on its other ranks.
        attention_length: of the model's geometry; see `sequence_cost`.
    """
    dealt_by = partial(_dealt, parallel=parallel, attention_length=attention_length)
    kept = [sample for sample in samples if sample.is_kept]
    slots = _slots(kept, parallel) if parallel.is_replica_head else {}
    num_slots = max(1, len(slots) * samples_per_prompt)

    def number_of(sample: Sample) -> int:
        slot = slots[sample.prompt_index] * samples_per_prompt + sample.sample_index
        return slot * num_mini_batches // num_slots

    mini_batches = []
    for number in range(num_mini_batches):
        dealt = dealt_by([sample for sample in kept if number_of(sample) == number])
        mini_batches.append(pack_rows(dealt, parallel, tokens_per_row, min_rows=1))
    dropped = [sample for sample in samples if not sample.is_kept]
    left_out = Counter(number_of(each) for each in dropped if each.prompt_index in slots)
    num_left_out = tuple(left_out[number] for number in range(num_mini_batches))
    dropped = dealt_by(dropped)
    return TrainBatch(
        mini_batches=tuple(mini_batches),
        num_left_out=parallel.from_replica_head(num_left_out),
        dropped=pack_rows(dropped, parallel, tokens_per_row, min_rows=0),
    )


def pack_rows(
    samples: Sequence[Sample], parallel: Parallel, tokens_per_row: int, *, min_rows: int
) -> tuple[MicroBatch, ...]:
    """Pack this replica's samples into rows, and add masked rows until every replica has as many
    rows as the one with the most, and as the pipeline's schedule needs. A collective over the
    data-parallel ranks.
    """
    multiple, sequence_multiple = (
        parallel.layout.row_multiple,
        parallel.layout.sequence_multiple,
    )
    size = row_size(1, tokens_per_row, multiple)
    if parallel.pp_size > 1:  # the stages exchange tensors of one shape
        lengths = [
            padded_length(len(sample.rollout.token_ids), sequence_multiple) for sample in samples
        ]
        size = max(size, largest_size(lengths, tokens_per_row, multiple))
    rows = pack(
        samples,
        tokens_per_row=tokens_per_row,
        min_size=size,
        multiple=multiple,
        sequence_multiple=sequence_multiple,
    )
    most = torch.tensor([len(rows)])
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=parallel.host.dp)
    group = parallel.layout.rows_per_group
    num_rows = -(-max(min_rows, int(most)) // group) * group
    filled = fill(rows, num_rows, size)
    return tuple(to_device(row, parallel.device) for row in filled)


def to_device(row: MicroBatch, device: torch.device) -> MicroBatch:
    """Copy the row, with every tensor moved to the device."""
    fields = {name: getattr(row, name) for name in MicroBatch.__dataclass_fields__}
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in fields.items()
    }
    return MicroBatch(**moved)


def unscored_samples(groups: Iterable[RolloutGroup]) -> list[Sample]:
    """One sample for each rollout, without reward and advantage, for passes that only compute
    log-probs.
    """
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
    """Each sample of the rows with its recomputed log-probs, split by `split_by_sample`."""
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
        The samples in the order of the row, each with its values, [L] float32 on the CPU, aligned
        with its tokens: 0.0 for the first token, which nothing predicts. Empty for a filler row.
    """
    pairs = []
    # Not strict, because cu_seqlens_padded has one more entry than there are samples.
    for start, sample in zip(micro_batch.cu_seqlens_padded.tolist(), micro_batch.samples):
        length = len(sample.rollout.token_ids)
        of_tokens = torch.zeros(length)
        of_tokens[1:] = values[start : start + length - 1].cpu()
        pairs.append((sample, of_tokens))
    return pairs


def _slots(kept: Sequence[Sample], parallel: Parallel) -> dict[int, int]:
    """Number the groups with a kept sample, of all replicas, by prompt index: index -> number."""
    own = sorted({sample.prompt_index for sample in kept})
    of_ranks = gather_from_all(own, parallel.host.dp)
    return {index: number for number, index in enumerate(sorted(chain(*of_ranks)))}


def _dealt(samples: Sequence[Sample], parallel: Parallel, attention_length: float) -> list[Sample]:
    """This replica's share of the redistributed samples, on each of its ranks."""
    dealt = []
    if parallel.is_replica_head:
        dealt = _deal_among_heads(samples, parallel, attention_length)
    return parallel.from_replica_head(dealt)


def _deal_among_heads(
    samples: Sequence[Sample], parallel: Parallel, attention_length: float
) -> list[Sample]:
    if parallel.dp_size > 1:
        own = [(*sample_key(sample), len(sample.rollout.token_ids)) for sample in samples]
        # Sorted by prompt, so that the result does not depend on which replica held a sample.
        of_all = sorted(chain(*gather_from_all(own, parallel.host.dp)))
        by_key = {sample_key(sample): sample for sample in samples}
        costs = [sequence_cost(length, attention_length) for *_, length in of_all]
        shares = deal(costs, parallel.dp_size)
        keys = [[of_all[index][:2] for index in share] for share in shares]
        items_for = [[by_key[key] for key in each if key in by_key] for each in keys]
        samples = exchange(items_for, parallel.host.dp)
    return sorted(samples, key=sample_key)


def sample_key(sample: Sample) -> tuple[int, int]:
    """Identifies a sample in its step, and orders the samples of a step."""
    return sample.prompt_index, sample.sample_index
