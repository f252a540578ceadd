"""What the loop needs to know of the layout; `learner.layout.parallel.Parallel` provides it."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_rl.observe.metrics import AllReduce


class Replicas(Protocol):
    """The model replicas of a run, as one rank sees them. The head of a replica is its first rank,
    which talks to the engines.
    """

    @property
    def is_replica_head(self) -> bool:
        """Whether this rank is the head of its replica."""
        ...

    def from_replica_head(self, value: Any) -> Any:
        """The head's value on every rank of the replica; a collective of the replica."""
        ...

    def reducer(self) -> AllReduce:
        """Reduces over the heads of all replicas."""
        ...
