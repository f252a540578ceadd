"""What one tensor-parallel rank sends for a row: the maximal complete nodes of its columns, and the
raw columns of granules that a shard's edge cuts.

Fixed by the edges of the shards alone, so that nothing but the numbers travels. csrc/shard_layout.h
is the same in C++. A row is int32 words, floats by their bits: the largest y (NaN if one is), the
label's y (0 if it is another rank's), then N, S and, with entropy, B of each node, then each raw
column's y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GRANULE = 128  # columns
HEADER_WORDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLayout:
    """Example: columns 100 to 999 of a vocabulary of 5,000 hold granules 1 to 6, in the nodes
    ((1, 0), (2, 1), (4, 1), (6, 0)); columns 100 to 127 and 896 to 999 are raw.
    """

    columns: tuple[int, int]  # global, [begin, end), without padding
    nodes: tuple[tuple[int, int], ...]  # (first granule, level), each of 2^level granules
    head: tuple[int, int]  # raw columns before the nodes, [begin, end)
    tail: tuple[int, int]  # and behind them

    def num_words(self, *, has_entropy: bool) -> int:
        num_raw = self.head[1] - self.head[0] + self.tail[1] - self.tail[0]
        return HEADER_WORDS + len(self.nodes) * (3 if has_entropy else 2) + num_raw


def node_layout(edges: Sequence[int], rank: int, vocab_size: int) -> NodeLayout:
    """The layout of one shard.

    Args:
        edges: global columns at which the shards begin, padding included, and the end of the last.
        rank: of the shard.
        vocab_size: V; columns from there on are padding, so V's own granule is never cut by it.
    """
    begin, end = (min(edge, vocab_size) for edge in (edges[rank], edges[rank + 1]))
    first = -(-begin // GRANULE)
    last = max(first, -(-end // GRANULE) if end == vocab_size else end // GRANULE)
    nodes = []
    granule = first
    while granule < last:
        level = 0
        while granule % (2 << level) == 0 and granule + (2 << level) <= last:
            level += 1
        nodes.append((granule, level))
        granule += 1 << level
    return NodeLayout(
        columns=(begin, end),
        nodes=tuple(nodes),
        head=(begin, min(first * GRANULE, end)),
        tail=(min(last * GRANULE, end), end),
    )


def words_per_row(edges: Sequence[int], vocab_size: int, *, has_entropy: bool) -> int:
    """Words of the longest row of any rank: every rank sends equally many."""
    return max(
        node_layout(edges, rank, vocab_size).num_words(has_entropy=has_entropy)
        for rank in range(len(edges) - 1)
    )
