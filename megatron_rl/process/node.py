"""The node that this process runs on, as its launcher numbers it."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node of a run. Example: the second of two nodes with 8 ranks each: `Node(index=1,
    count=2, num_ranks=8)`.
    """

    index: int
    count: int  # of nodes with ranks
    num_ranks: int  # on each of them; 0: none, as in a process that only starts engines


def this_node() -> Node:
    """The node of this rank, from torchrun's variables; without them the only one, of one rank."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    index = int(os.environ.get("GROUP_RANK", int(os.environ.get("RANK", "0")) // num_ranks))
    return Node(index=index, count=world_size // num_ranks, num_ranks=num_ranks)


def is_first_of_node() -> bool:
    """Whether this is the first rank of its node, which starts the node's engines."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0
