"""Which columns a truncating sampler could have chosen, found from vocabulary-parallel logits
without gathering or sorting them.

    y = logits / T;  min_p keeps exp(y) >= min_p * max exp(y);  top_k the k largest y of those;
    top_p those of what is left above which less than p of its probability lies

That is vLLM's order and its rules (vllm/v1/sample/ops/topk_topp_sampler.py). The support of a row
is then: every column above an edge, and some or all of the columns on it. The edge is the key, an
integer in the order of the logits, of the smallest logit that is kept; it is found 8 bits a round,
from a histogram of the keys that still qualify, summed over the ranks as integers. A probability is
counted as round(exp(y) * 2^(40 - N)) of the aligned log-prob's own term, so that sums are exact,
and the support is the same whatever the number of shards.

Of c equal logits on the edge of top_p, ceil((p * all - above) / each), at least one, are kept. The
engine keeps as many (vLLM's torch path sorts, and which of them come first is the sort's chance):
here the label first, then the lowest columns.

Collectives: an all-reduce of [N, 256] int64 a round ([2, N, 256] in the last one for top_p), 2
rounds for 16-bit logits, 4 for float32, for top_k and for top_p each; one gather of [N, 3] int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_rl.ops import kernels
from megatron_rl.ops import support_reference as reference
from megatron_rl.ops.reference import LARGEST_LOGIT
from megatron_rl.ops.vocab_parallel import VocabShard, all_reduce_sum, gather_rows
from megatron_rl.records import Truncation

BITS_PER_ROUND = 8
NO_LIMIT = 2**62  # more columns than there are


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """The support of [N] rows, as this rank needs it: three tensors [N].

    Example, of BF16 logits 3.0, 1.0, 1.0, 0.0 with top_k=2 and ties="exact" and label 3: the edge
    is the key of 1.0, the quota 1, and the label lies outside.
    """

    edge: torch.Tensor  # int64 key: columns above it are in the support
    quota: torch.Tensor  # int64: of this shard's columns on it, without the label, the first are in
    is_outside: torch.Tensor  # bool: the label is not in the support


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edge:
    """Where a search ended: three tensors [N] int64."""

    key: torch.Tensor
    missing: torch.Tensor  # what the columns on it must still give: a count, or a mass
    num_ties: torch.Tensor  # columns on it, over all shards
    num_local_ties: torch.Tensor  # and in this one


class _Search:
    """The rounds of histograms over one batch of rows."""

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
        """[N] int64: the smallest key that min_p keeps, by bisection; above that of -inf."""
        dtype = self.logits.dtype
        low = torch.full_like(self.maximum, reference.key_of_minus_infinity(dtype) + 1).long()
        if min_p == 0.0:
            return low
        share = float(torch.tensor(min_p, dtype=torch.float32))  # as the engine holds it
        bound = share * reference.terms(self.maximum, self.maximum).double()
        high = torch.full_like(low, (1 << reference.key_bits(dtype)) - 1)
        # Invariant: `high` is kept (or no number at all), what is below `low` is not.
        for _ in range(reference.key_bits(dtype)):
            middle = (low + high) // 2
            y = reference.logits_of(middle, dtype, self.temperature)
            is_kept = (y >= self.maximum) | (reference.terms(y, self.maximum).double() >= bound)
            is_kept |= y.isnan()  # beyond the largest number
            low, high = torch.where(is_kept, low, middle + 1), torch.where(is_kept, middle, high)
        return high

    def descend(self, lowest: torch.Tensor, wanted: float, surplus: torch.Tensor | None) -> _Edge:
        """The largest key at and above which enough columns lie.

        Args:
            lowest: [N] int64; smaller keys do not count.
            wanted: how many columns; or the share of their mass, once `surplus` is taken off it.
            surplus: [N] int64; None: columns are counted.
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
            # Of masses, the counts matter in the last round alone.
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
        name = kernels.instruction_set()
        return torch.ops.megatron_rl.support_histogram(*given, has_masses, name)


def _first_wanted(total: torch.Tensor, wanted: float, surplus: torch.Tensor | None) -> torch.Tensor:
    """What to look for, once the row's total is known: k columns or all that there are; or the mass
    that p asks for, so that `above < p * all` is `above < wanted` in integers.
    """
    if surplus is None:
        return total.clamp(max=int(wanted))
    share = float(torch.tensor(wanted, dtype=torch.float32))  # as the engine holds it
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
        logits: [N, V] float32, bfloat16 or float16, this rank's shard, columns side by side.
        labels: [N] int64, global, the same on every rank.
        maximum: [N] float32, the largest y of the row over all shards. A row whose maximum is
            broken keeps every column.
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
        mass = search.mass_of(found.key).clamp(min=1)  # 0 only in a broken row
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
    """Each rank's part of the columns on the edge: the label first, then the lowest columns."""
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
    """[N] int64 column of the label in this shard; -1 where another rank holds it."""
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
    """A copy of the logits with -inf outside the support; the label stays."""
    width = min(max(shard.vocab_size - shard.start, 0), logits.shape[1])
    column = label_column(labels, width, shard)
    given = (logits, support.edge, support.quota, column, temperature, width)
    if logits.device.type != "cpu":
        return reference.keep(*given)
    kernels.load()
    return torch.ops.megatron_rl.support_keep(*given)
