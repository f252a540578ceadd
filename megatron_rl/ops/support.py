"""Finds the columns that a truncating sampler could have chosen: the support of a row.

The logits are vocabulary-parallel; they are neither gathered nor sorted.

    y = logits / T
    min_p keeps the columns with exp(y) >= min_p * max exp(y);
    top_k keeps the k largest y of those;
    top_p keeps a remaining column if the columns above it hold less than p of the remaining
    probability.

These are vLLM's rules, in vLLM's order (vllm/v1/sample/ops/topk_topp_sampler.py). The support of a
row is then every column above an edge, and some or all of the columns on the edge. The edge is the
key (an integer with the order of the logits) of the smallest logit that is kept. It is found 8 bits
per round, from a histogram of the keys that still qualify, summed over the ranks as integers. A
probability is counted as round(exp(y) * 2^(40 - N)), from the term of the aligned log-prob, so the
sums are exact and the support does not depend on the number of shards.

Of c equal logits on the edge of top_p, ceil((p * all - above) / each) are kept, and at least one.
The engine keeps the same number of them; which ones depends on the order of its sort (vLLM's torch
implementation). Here the label comes first, then the lowest columns.

Collectives: one all-reduce of [N, 256] int64 per round ([2, N, 256] in the last round of top_p),
with 2 rounds for 16-bit logits and 4 for float32, for each of top_k and top_p; and one gather of
[N, 3] int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_rl.ops import support_reference as reference
from megatron_rl.ops.arithmetic import LARGEST_LOGIT
from megatron_rl.ops.extension import instruction_set, load_extension
from megatron_rl.ops.vocab_parallel import VocabShard, all_reduce_sum, gather_rows
from megatron_rl.records import Truncation

BITS_PER_ROUND = 8
NO_LIMIT = 2**62  # above any number of columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """The support of N rows, in the form that this rank needs.

    Example, of BF16 logits 3.0, 1.0, 1.0, 0.0 with top_k=2, ties="exact" and label 3: the edge is
    the key of 1.0, the quota is 1, and the label is outside.
    """

    edge: torch.Tensor  # [N] int64 key; columns with a larger key are in the support
    # [N] int64: how many of this shard's columns on the edge are in the support: the first ones,
    # not counting the label
    quota: torch.Tensor
    is_outside: torch.Tensor  # [N] bool: the label is not in the support


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edge:
    """The result of a search: four tensors [N] int64."""

    key: torch.Tensor
    missing: torch.Tensor  # count or mass that the columns on the edge must still contribute
    num_ties: torch.Tensor  # columns on the edge in all shards
    num_local_ties: torch.Tensor  # columns on the edge in this shard


class _Search:
    """Searches for the edge in one batch of rows, by rounds of histograms."""

    def __init__(
        self,
        logits: torch.Tensor,
        maximum: torch.Tensor,
        temperature: float,
        width: int,
        group: ProcessGroup | None,
    ) -> None:
        self.logits = logits
        self.maximum = maximum
        self.temperature = temperature
        self.width = width
        self.group = group
        self.is_sound = maximum.abs() <= LARGEST_LOGIT  # False for NaN

    def mass_of(self, key: torch.Tensor) -> torch.Tensor:
        """[N] int64 mass of one column with the row's key."""
        y = reference.logits_of(key, self.logits.dtype, self.temperature)
        return reference.masses(y, self.maximum)

    def lowest(self, min_p: float) -> torch.Tensor:
        """[N] int64: the smallest key that min_p keeps, by bisection; always above that of -inf."""
        dtype = self.logits.dtype
        low = torch.full_like(self.maximum, reference.key_of_minus_infinity(dtype) + 1).long()
        if min_p == 0.0:
            return low
        share = float(torch.tensor(min_p, dtype=torch.float32))  # rounded as in the engine
        bound = share * reference.terms(self.maximum, self.maximum).double()
        high = torch.full_like(low, (1 << reference.key_bits(dtype)) - 1)
        # Invariant: `high` is kept (or is not the key of a number), keys below `low` are not.
        for _ in range(reference.key_bits(dtype)):
            middle = (low + high) // 2
            y = reference.logits_of(middle, dtype, self.temperature)
            is_kept = (y >= self.maximum) | (reference.terms(y, self.maximum).double() >= bound)
            is_kept |= y.isnan()  # the key of no number, above the largest one
            low, high = torch.where(is_kept, low, middle + 1), torch.where(is_kept, middle, high)
        return high

    def descend(self, lowest: torch.Tensor, wanted: float, surplus: torch.Tensor | None) -> _Edge:
        """The largest key such that enough columns have this key or a larger one.

        Args:
            lowest: [N] int64; columns with a smaller key do not count.
            wanted: number of columns; with `surplus`, share of the total mass less the surplus.
            surplus: [N] int64 mass; None: search by the number of columns.
        """
        has_masses = surplus is not None
        prefix = torch.zeros_like(lowest)
        missing = torch.zeros_like(lowest)
        first_shift = reference.key_bits(self.logits.dtype) - BITS_PER_ROUND
        for shift in range(first_shift, -1, -BITS_PER_ROUND):
            low = prefix << (shift + BITS_PER_ROUND)
            high = low + (1 << (shift + BITS_PER_ROUND)) - 1
            low = torch.where(self.is_sound, torch.maximum(low, lowest), high + 1)
            local = self._histogram(low, high, shift, has_masses)
            # When searching by mass, the counts are needed only in the last round.
            searched = local if shift == 0 else local[-1:]
            summed = all_reduce_sum(searched.clone(), self.group)
            at_or_above = summed[-1].flip(1).cumsum(1).flip(1)
            if shift == first_shift:
                missing = _first_wanted(at_or_above[:, 0], wanted, surplus)
            bins = (at_or_above >= missing[:, None]).sum(1, keepdim=True).clamp(min=1) - 1
            of_bin = summed[-1].gather(1, bins)[:, 0]
            missing = missing - (at_or_above.gather(1, bins)[:, 0] - of_bin)
            prefix = (prefix << BITS_PER_ROUND) | bins[:, 0]
        return _Edge(
            key=prefix,
            missing=missing,
            num_ties=summed[0].gather(1, bins)[:, 0],
            num_local_ties=local[0].gather(1, bins)[:, 0],
        )

    def _histogram(
        self, low: torch.Tensor, high: torch.Tensor, shift: int, has_masses: bool
    ) -> torch.Tensor:
        given = (self.logits, self.maximum, low, high, self.temperature, self.width, shift)
        if self.logits.device.type != "cpu":
            return reference.histogram(*given, has_masses)
        name = instruction_set()
        return torch.ops.megatron_rl.support_histogram(*given, has_masses, name)


def _first_wanted(total: torch.Tensor, wanted: float, surplus: torch.Tensor | None) -> torch.Tensor:
    """[N] int64 count or mass to search for, once the total of the row is known.

    By count: k, or the total if there are fewer columns. By mass: the smallest integer for which
    `above < p * all` is the same as `above < wanted`.
    """
    if surplus is None:
        return total.clamp(max=int(wanted))
    share = float(torch.tensor(wanted, dtype=torch.float32))  # rounded as in the engine
    return ((total - surplus).double() * share).ceil().long()


def find_support(
    logits: torch.Tensor,
    labels: torch.Tensor,
    maximum: torch.Tensor,
    *,
    truncation: Truncation,
    temperature: float,
    shard: VocabShard,
    group: ProcessGroup | None,
) -> Support:
    """The support of every row. A collective over the group.

    Args:
        logits: [N, V] float32, bfloat16 or float16: this rank's shard, contiguous in columns.
        labels: [N] int64, global token ids, the same on every rank.
        maximum: [N] float32, the largest y of the row over all shards. A row whose maximum is NaN
            or out of range keeps every column.
    """
    width = min(max(shard.vocab_size - shard.start, 0), logits.shape[1])
    search = _Search(logits, maximum, temperature, width, group)
    lowest = search.lowest(truncation.min_p)
    quota = torch.full_like(lowest, NO_LIMIT)
    num_local_ties = torch.zeros_like(lowest)
    surplus = torch.zeros_like(lowest)
    if truncation.top_k > 0:
        found = search.descend(lowest, truncation.top_k, None)
        lowest, num_local_ties = found.key, found.num_local_ties
        if truncation.ties == "exact":
            quota = found.missing
            surplus = (found.num_ties - quota) * search.mass_of(lowest)
    edge = lowest
    if truncation.top_p < 1.0:
        found = search.descend(lowest, truncation.top_p, surplus)
        mass = search.mass_of(found.key).clamp(min=1)  # a mass of 0 occurs only in a broken row
        quota = (found.missing + mass - 1) // mass
        edge, num_local_ties = found.key, found.num_local_ties
    edge = torch.where(search.is_sound, edge, -1)
    return _share_edge(search, labels, edge, quota, num_local_ties, shard)


def _share_edge(
    search: _Search,
    labels: torch.Tensor,
    edge: torch.Tensor,
    quota: torch.Tensor,
    num_local_ties: torch.Tensor,
    shard: VocabShard,
) -> Support:
    """Split the columns on the edge between the ranks: the label first, then the lowest columns."""
    column = label_column(labels, search.width, shard)
    is_local = column >= 0
    at_label = search.logits.gather(1, column.clamp(min=0)[:, None])[:, 0]
    key = torch.where(is_local, reference.keys(at_label, search.temperature), -2)
    is_tie, is_inside = key == edge, key >= edge
    words = torch.stack([num_local_ties - is_tie.long(), is_tie.long(), is_inside.long()], dim=1)
    gathered = gather_rows(words, search.group)  # [R, N, 3]
    before = gathered[: shard.rank, :, 0].sum(0)
    return Support(
        edge=edge,
        quota=(quota - gathered[:, :, 1].sum(0) - before).clamp(min=0),
        is_outside=gathered[:, :, 2].sum(0) == 0,
    )


def label_column(labels: torch.Tensor, width: int, shard: VocabShard) -> torch.Tensor:
    """[N] int64: the column of the label in this shard, -1 if another rank holds it."""
    column = labels - shard.start
    return torch.where((column >= 0) & (column < width), column, -1)


def keep_support(
    logits: torch.Tensor,
    labels: torch.Tensor,
    support: Support,
    *,
    temperature: float,
    shard: VocabShard,
) -> torch.Tensor:
    """A copy of the logits [N, V] with -inf outside the support; the label keeps its logit."""
    width = min(max(shard.vocab_size - shard.start, 0), logits.shape[1])
    column = label_column(labels, width, shard)
    given = (logits, support.edge, support.quota, column, temperature, width)
    if logits.device.type != "cpu":
        return reference.keep(*given)
    load_extension()
    return torch.ops.megatron_rl.support_keep(*given)
