"""The interface through which the loop sees the layout; `learner.layout.parallel.Parallel`
implements it.
"""

from __future__ import annotations

from typing import Any, Protocol

from megatron_rl.observe.metrics import AllReduce


class Replicas(Protocol):
    """The model replicas of a run, seen from one rank. The head of a replica is its first rank; it
    is the one that sends requests to the engines.
    """

    @property
    def is_replica_head(self) -> bool:
        """Whether this rank is the head of its replica."""
        ...

    def from_replica_head(self, value: Any) -> Any:
        """Broadcast the head's value to the ranks of the replica. A collective over the replica."""
        ...

    def reducer(self) -> AllReduce:
        """A function that reduces over the heads of all replicas."""
        ...
