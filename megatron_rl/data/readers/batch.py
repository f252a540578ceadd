"""Consecutive rows of one data file, the form in which every reader hands them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """Consecutive rows of one file.

    Readers of columns convert only the columns that were asked for, because most rows of a file
    that repeats its rows are needed no further; `whole` converts all columns of the others.

    Example: the first two lines of a JSONL file of four: `RowBatch(records=({"question": "4+3",
    "answer": "7"}, {"question": "1+1", "answer": "2"}), numbers=(1, 2), unit="line", share=0.5,
    whole=...)`.
    """

    records: Sequence[dict[str, Any]]  # with at least the columns that were asked for
    numbers: Sequence[int]  # of the lines, from 1, or of the rows, from 0
    unit: str  # what the numbers count: "line" or "row"
    share: float  # of the file that has been read at the end of this batch, 0 to 1
    whole: Callable[[Sequence[int]], list[dict[str, Any]]]  # positions in the batch -> all columns

    def place(self, position: int) -> str:
        """Names a row of the batch in messages, for instance "line 2"."""
        return f"{self.unit} {self.numbers[position]}"


def batch_of_lines(
    records: Sequence[dict[str, Any]], numbers: Sequence[int], share: float
) -> RowBatch:
    """A batch of records that were read with all their columns, from numbered lines."""
    return RowBatch(
        records=records,
        numbers=numbers,
        unit="line",
        share=share,
        whole=lambda positions: [records[position] for position in positions],
    )
