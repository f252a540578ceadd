"""Which prompts of the stream are used: trained on, or dropped because their group was too old.

A run that samples ahead may use prompts in another order than that of the stream. The ledger says
which, so that a resumed run uses each of the others once. It is two values: `first`, before which
every prompt is used, and `ahead`, the used ones after it.

Each replica takes its own prompts: of those that are unused when the run starts, in order, replica
r of R takes number r, r + R, r + 2R, and so on. A resumed run may have another number of replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The used prompts of a run. Example, of which 0 to 9, 11 and 12 are used:
    `Ledger(first=10, ahead=(11, 12))`.
    """

    first: int = 0  # index of the first prompt that is not used
    ahead: tuple[int, ...] = ()  # used prompts after it, ascending

    def unused(self, replica: int, num_replicas: int) -> Iterator[int]:
        """The unused prompts of one replica, ascending, without end."""
        ahead = frozenset(self.ahead)
        unused = (index for index in count(self.first) if index not in ahead)
        return islice(unused, replica, None, num_replicas)

    def with_used(self, indices: Iterable[int]) -> Ledger:
        """The ledger after further prompts were used.

        Raises:
            ValueError: one of them was used before.
        """
        added = sorted(indices)
        known = set(self.ahead)
        twice = [each for each in added if each < self.first or each in known]
        twice += [one for one, other in pairwise(added) if one == other]
        if twice:
            raise ValueError(f"ledger: expected prompts that are not used yet, got {twice}")
        used = known.union(added)
        first = self.first
        while first in used:
            first += 1
        return Ledger(first=first, ahead=tuple(sorted(each for each in used if each > first)))


def joined(start: Ledger, used: Sequence[Iterable[int]]) -> Ledger:
    """The ledger of the whole run.

    Args:
        start: when the run started.
        used: for every replica, the prompts that it has used since then.
    """
    return start.with_used(index for each in used for index in each)
