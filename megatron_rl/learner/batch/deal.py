"""Samples of every replica in, each rank's packed rows out.

Only the heads of the replicas (first rank of TP x PP) hold samples. They deal the sequences anew
among themselves, so that every replica gets about as many tokens; each head then hands its share to
the other ranks of its replica, and all of them pack it alike. How many ranks there are changes who
computes a sequence, never in which mini-batch it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist

from megatron_rl.learner.batch.packing import deal, fill, pack, plan_rows
from megatron_rl.learner.layout.exchange import exchange, gather_from_all
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.records import MicroBatch, Sample, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class DealtBatch:
    """A TrainBatch and the samples that its rows hold: `samples[m][r][s]` is sequence s of row r of
    part m (`TrainBatch.parts`).

    Example: one mini-batch of one row with two sequences: `samples=(((Sample(...),
    Sample(...)),),)`.
    """

    batch: TrainBatch
    samples: tuple[tuple[tuple[Sample, ...], ...], ...]


def deal_batch(
    samples: Sequence[Sample],
    parallel: Parallel,
    *,
    samples_per_prompt: int,
    num_mini_batches: int,
    tokens_per_row: int,
) -> DealtBatch:
    """Deal and pack one step's samples; a collective over all ranks.

    The groups with a kept sample are counted through by prompt index, over all replicas, and their
    samples fall into the mini-batches in that order, about as many into each. What is not kept
    stands in rows of its own.

    Args:
        samples: this replica's own, on its head; ignored elsewhere.
    """
    kept = [sample for sample in samples if sample.is_kept]
    slots = _slots(kept, parallel) if parallel.is_replica_head else {}
    num_slots = max(1, len(slots) * samples_per_prompt)
    mini_batches, held = [], []
    for number in range(num_mini_batches):
        own = [
            sample
            for sample in kept
            if (slots[sample.prompt_index] * samples_per_prompt + sample.sample_index)
            * num_mini_batches
            // num_slots
            == number
        ]
        packed = pack_batch(_dealt(own, parallel), parallel, tokens_per_row)
        mini_batches += packed.batch.mini_batches
        held += packed.samples
    others = _dealt([sample for sample in samples if not sample.is_kept], parallel)
    measured = pack_rows(others, parallel, tokens_per_row, min_rows=0)
    if measured:
        held.append(_held(others, tokens_per_row))
    return DealtBatch(
        batch=TrainBatch(mini_batches=tuple(mini_batches), measured=measured), samples=tuple(held)
    )


def pack_batch(samples: Sequence[Sample], parallel: Parallel, tokens_per_row: int) -> DealtBatch:
    """One mini-batch of samples that every rank of the replica holds already; a collective."""
    rows = pack_rows(samples, parallel, tokens_per_row, min_rows=1)
    held = _held(samples, tokens_per_row)
    return DealtBatch(batch=TrainBatch(mini_batches=(rows,)), samples=(held,))


def pack_rows(
    samples: Sequence[Sample], parallel: Parallel, tokens_per_row: int, *, min_rows: int
) -> tuple[MicroBatch, ...]:
    """This replica's samples as rows, filled up with masked ones to as many as any replica has; a
    collective.
    """
    rows = pack(samples, tokens_per_row=tokens_per_row)
    most = torch.tensor([len(rows)], dtype=torch.int64, device=parallel.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=parallel.dp_group)
    filled = fill(rows, max(min_rows, int(most)), tokens_per_row)
    return tuple(to_device(row, parallel.device) for row in filled)


def to_device(row: MicroBatch, device: torch.device) -> MicroBatch:
    """The row with every tensor on the device."""
    return MicroBatch(
        **{name: getattr(row, name).to(device) for name in MicroBatch.__dataclass_fields__}
    )


def recomputed_by_sample(
    dealt: DealtBatch, recomputed: Sequence[Sequence[torch.Tensor]]
) -> list[tuple[Sample, torch.Tensor]]:
    """Each sample with its recomputed log-probs, [L] float32 aligned with its own tokens (0.0 for
    the first).

    Args:
        recomputed: a [T] a row a part, aligned with the prediction, as `train_step` returns it.
    """
    found = []
    for rows, row_samples, row_values in zip(
        dealt.batch.parts, dealt.samples, recomputed, strict=True
    ):
        # Not strict: rows that were filled up hold no samples.
        for row, samples, values in zip(rows, row_samples, row_values):
            for start, sample in zip(row.cu_seqlens_padded.tolist(), samples):
                length = len(sample.rollout.token_ids)
                of_tokens = torch.zeros(length)
                of_tokens[1:] = values[start : start + length - 1].cpu()
                found.append((sample, of_tokens))
    return found


def _held(samples: Sequence[Sample], tokens_per_row: int) -> tuple[tuple[Sample, ...], ...]:
    plan = plan_rows(samples, tokens_per_row=tokens_per_row)
    return tuple(tuple(samples[index] for index in row) for row in plan)


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
        # By prompt, so that who holds a sample now does not matter to who gets it.
        everyones = sorted(chain(*gather_from_all(own, parallel.dp_group)))
        by_key = {_key(sample): sample for sample in samples}
        shares = deal([length for *_, length in everyones], parallel.dp_size)
        keys = [[everyones[index][:2] for index in share] for share in shares]
        items_for = [[by_key[key] for key in each if key in by_key] for each in keys]
        samples = exchange(items_for, parallel.dp_group, parallel.device)
    return sorted(samples, key=_key)


def _key(sample: Sample) -> tuple[int, int]:
    return sample.prompt_index, sample.sample_index
