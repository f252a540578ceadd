"""Determines the task of each prompt index, and the number of earlier prompts of the same task.

Both are functions of (seed, index) only, through the mixer of splitmix64 (Steele, Lea and Flood
2014). There is no generator state, so a run needs only the next index to continue.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BLOCK = 4096  # indices whose tasks are drawn together
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def derive_seed(*parts: int) -> int:
    """A seed of 31 bits from integers; other integers, or another order, give another seed."""
    state = 0
    for part in parts:
        state = int(_splitmix64(np.array([(state ^ part) & _MASK], dtype=np.uint64))[0])
    return state >> 33


class Mixture:
    """Draws a task number for each index, with probabilities proportional to the weights.

    Example: `Mixture([3.0, 1.0], seed=0)` draws task 0 for three indices in four; `rank(i)` is the
    number of indices below i with the same task as i, which is the position in that task's stream.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._borders = np.cumsum(weights) / sum(weights)
        self._borders[-1] = 1.0
        self._seed = derive_seed(seed)
        self._blocks: list[np.ndarray] = []  # [_BLOCK] int16 task numbers, drawn so far
        self._counts = [np.zeros(len(weights), dtype=np.int64)]  # of each task before a block

    def task(self, index: int) -> int:
        """The number of the task that the prompt `index` comes from."""
        return int(self._block(index // _BLOCK)[index % _BLOCK])

    def rank(self, index: int) -> int:
        """The number of prompts below `index` that come from the same task."""
        number, offset = divmod(index, _BLOCK)
        block = self._block(number)
        task = block[offset]
        return int(self._counts[number][task] + np.count_nonzero(block[:offset] == task))

    def _block(self, number: int) -> np.ndarray:
        while len(self._blocks) <= number:
            start = len(self._blocks) * _BLOCK
            indices = np.arange(start, start + _BLOCK, dtype=np.uint64)
            shares = _splitmix64(indices + np.uint64(self._seed << 32)) * 2.0**-64
            tasks = np.searchsorted(self._borders, shares, side="right")
            block = np.minimum(tasks, len(self._borders) - 1).astype(np.int16)
            self._blocks.append(block)
            self._counts.append(self._counts[-1] + np.bincount(block, minlength=len(self._borders)))
        return self._blocks[number]


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 on [n] uint64, one step after each value."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(_GOLDEN)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
