"""Samples of every replica in, each rank's packed rows out.

Only the heads of the replicas (first rank of TP x PP) hold samples. They deal the sequences anew
among themselves, so that every replica gets about as many tokens; each head then hands its share to
the other ranks of its replica, and all of them pack it alike. How many ranks there are changes who
computes a sequence, never in which mini-batch it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rl.data.packing import deal, fill, pack, plan_rows
from megatron_rl.learner.exchange import exchange, gather_from_all
from megatron_rl.learner.parallel import Parallel
from megatron_rl.records import MicroBatch, Sample, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class DealtBatch:
    """A TrainBatch and the samples that its rows hold: `samples[m][r][s]` is sequence s of row r of
    mini-batch m.

    Example: one mini-batch of one row with two sequences: `samples=(((Sample(...),
    Sample(...)),),)`.
    """

    batch: TrainBatch
    samples: tuple[tuple[tuple[Sample, ...], ...], ...]


def deal_batch(
    samples: Sequence[Sample],
    parallel: Parallel,
    *,
    first_prompt: int,
    num_prompts: int,
    samples_per_prompt: int,
    num_mini_batches: int,
    tokens_per_row: int,
) -> DealtBatch:
    """Deal and pack one step's samples; a collective over all ranks.

    Args:
        samples: this replica's own, on its head; ignored elsewhere.
        first_prompt, num_prompts, samples_per_prompt: of the global batch, by which a sample's
            mini-batch is found.
    """
    num_samples = num_prompts * samples_per_prompt
    mini_batches, held = [], []
    for number in range(num_mini_batches):
        own = [
            sample
            for sample in samples
            if ((sample.prompt_index - first_prompt) * samples_per_prompt + sample.sample_index)
            * num_mini_batches
            // num_samples
            == number
        ]
        dealt = _deal_among_heads(own, parallel) if parallel.is_replica_head else []
        packed = pack_batch(parallel.from_replica_head(dealt), parallel, tokens_per_row)
        mini_batches += packed.batch.mini_batches
        held += packed.samples
    return DealtBatch(batch=TrainBatch(mini_batches=tuple(mini_batches)), samples=tuple(held))


def pack_batch(samples: Sequence[Sample], parallel: Parallel, tokens_per_row: int) -> DealtBatch:
    """One mini-batch of samples that every rank of the replica holds already; a collective."""
    rows = pack_rows(samples, parallel, tokens_per_row)
    plan = plan_rows(samples, tokens_per_row=tokens_per_row)
    held = tuple(tuple(samples[index] for index in row) for row in plan)
    return DealtBatch(batch=TrainBatch(mini_batches=(rows,)), samples=(held,))


def pack_rows(
    samples: Sequence[Sample], parallel: Parallel, tokens_per_row: int
) -> tuple[MicroBatch, ...]:
    """This replica's samples as rows, filled up with masked ones to as many as any replica has; a
    collective.
    """
    rows = pack(samples, tokens_per_row=tokens_per_row)
    most = torch.tensor([len(rows)], dtype=torch.int64, device=parallel.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=parallel.dp_group)
    return tuple(
        to_device(row, parallel.device) for row in fill(rows, max(1, int(most)), tokens_per_row)
    )


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
        recomputed: a [T] a row a mini-batch, aligned with the prediction, as `train_step` returns
            it.
    """
    found = []
    for rows, row_samples, row_values in zip(
        dealt.batch.mini_batches, dealt.samples, recomputed, strict=True
    ):
        # Not strict: rows that were filled up hold no samples.
        for row, samples, values in zip(rows, row_samples, row_values):
            for start, sample in zip(row.cu_seqlens_padded.tolist(), samples):
                length = len(sample.rollout.token_ids)
                of_tokens = torch.zeros(length)
                of_tokens[1:] = values[start : start + length - 1].cpu()
                found.append((sample, of_tokens))
    return found


def _deal_among_heads(samples: Sequence[Sample], parallel: Parallel) -> list[Sample]:
    if parallel.dp_size > 1:
        lengths = [len(sample.rollout.token_ids) for sample in samples]
        of_ranks = gather_from_all(lengths, parallel.dp_group)
        first = sum(len(each) for each in of_ranks[: parallel.dp_rank])
        shares = deal([length for each in of_ranks for length in each], parallel.dp_size)
        items_for = [
            [samples[index - first] for index in share if first <= index < first + len(samples)]
            for share in shares
        ]
        samples = exchange(items_for, parallel.dp_group, parallel.device)
    return sorted(samples, key=lambda sample: (sample.prompt_index, sample.sample_index))
