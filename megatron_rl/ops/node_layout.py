"""The layout of the words that a tensor-parallel rank sends per row.

A rank sends the largest complete nodes of its columns, and the raw columns of each granule that an
edge of its shard splits. The layout follows from the edges of the shards, so only the numbers are
sent. csrc/shard_layout.h is the same code in C++.

A row consists of int32 words; a float is sent as its bits. In order: the largest y (NaN if any y
is), the label's y (0 if another rank holds the label), then N, S and, with entropy, B of each node,
then y of each raw column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GRANULE = 128  # columns
HEADER_WORDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLayout:
    """The nodes and raw columns of one shard.

    Example: columns 100 to 999 of a vocabulary of 5,000 contain the granules 1 to 6, as the nodes
    ((1, 0), (2, 1), (4, 1), (6, 0)); columns 100 to 127 and 896 to 999 are raw.
    """

    columns: tuple[int, int]  # global, [begin, end), without padding
    nodes: tuple[tuple[int, int], ...]  # (first granule, level), each of 2^level granules
    head: tuple[int, int]  # raw columns before the nodes, [begin, end)
    tail: tuple[int, int]  # raw columns after the nodes, [begin, end)

    def num_words(self, *, has_entropy: bool) -> int:
        """int32 words that the shard sends per row."""
        num_raw = self.head[1] - self.head[0] + self.tail[1] - self.tail[0]
        return HEADER_WORDS + len(self.nodes) * (3 if has_entropy else 2) + num_raw


def node_layout(edges: Sequence[int], rank: int, vocab_size: int) -> NodeLayout:
    """The layout of one shard.

    Args:
        edges: first global column of each shard, counting padding, and the end of the last one.
        rank: of the shard.
        vocab_size: V; columns from V on are padding. The granule that V falls into counts as
            complete where the shard reaches V.
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
    """int32 words per row, the same for every rank: those of the rank that needs the most."""
    return max(
        node_layout(edges, rank, vocab_size).num_words(has_entropy=has_entropy)
        for rank in range(len(edges) - 1)
    )
