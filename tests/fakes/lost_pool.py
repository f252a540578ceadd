"""A pool whose last engine is lost until it has been brought back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_rl.errors import EnginesLostError

Score = Callable[[Sequence[Sequence[int]]], list[tuple[float, ...]]]


class LostUntilRestored:
    """`score` of a pool, which raises EnginesLostError until `restore`, a `Restore`, was called."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self.told: list[str] = []  # to `restore`

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        if not self.told:
            raise EnginesLostError("none is left")
        return self._score(sequences)

    def restore(self, shortage: str) -> bool:
        self.told.append(shortage)
        return bool(shortage)
