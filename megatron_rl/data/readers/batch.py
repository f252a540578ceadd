"""Consecutive rows of one data file, the form in which every reader hands them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.data.readers.columns import hash_values

Records = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """Consecutive rows of one file.

    Rows are converted to records only where they are asked for, because most rows of a file that
    repeats its rows are needed no further than their hashes.

    Example: the first two lines of a JSONL file of four: `RowBatch(numbers=(1, 2), unit="line",
    share=0.5, hashes=lambda: [71..., 13...], partial=..., whole=...)`.
    """

    numbers: Sequence[int]  # of the lines, from 1, or of the rows, from 0
    unit: str  # what the numbers count: "line" or "row"
    share: float  # of the file that has been read at the end of this batch, 0 to 1
    # of each row 64 bits of the columns that were asked for, as they are in this file
    hashes: Callable[[], Sequence[int]]
    # positions in the batch -> records with at least the columns that were asked for, or with all
    partial: Callable[[Sequence[int]], Records]
    whole: Callable[[Sequence[int]], Records]

    def place(self, position: int) -> str:
        """Names a row of the batch in messages, for instance "line 2"."""
        return f"{self.unit} {self.numbers[position]}"


def batch_of_lines(
    rows: Sequence[tuple[int, dict[str, Any]]], columns: Sequence[str], share: float
) -> RowBatch:
    """A batch of numbered lines, whose records were read with all their columns."""

    def records(positions: Sequence[int]) -> Records:
        return [rows[position][1] for position in positions]

    return RowBatch(
        numbers=[number for number, _ in rows],
        unit="line",
        share=share,
        hashes=lambda: hash_values([record for _, record in rows], columns),
        partial=records,
        whole=records,
    )
