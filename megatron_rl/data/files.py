"""The stream of candidates from a JSONL or Parquet file: every row once per epoch, in a new order
in each epoch.

The order of an epoch is a function of (seed, epoch). With N rows, position p of the stream is
position p mod N of epoch p div N.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.data.candidate import Candidate, Layout, Messages, read_candidate, read_messages
from megatron_rl.data.mixture import derive_seed
from megatron_rl.errors import DataError


class FileSource:
    """The rows of a file. All are read once when it is opened, so that a bad row is found at the
    start of a run.

    Raises:
        DataError: the file is missing, empty, malformed or of an unsupported kind, or a row lacks a
            column or its text (the message names file and line).
    """

    def __init__(self, path: str, layout: Layout) -> None:
        readers = {".jsonl": _Jsonl, ".ndjson": _Jsonl, ".parquet": _Parquet}
        suffix = Path(path).suffix
        if suffix not in readers:
            raise DataError(f"{path}: expected a file ending in .jsonl or .parquet")
        if not Path(path).is_file():
            raise DataError(f"{path}: expected a file, found none")
        self._layout = layout
        self._path = path
        self._table: _Jsonl | _Parquet = readers[suffix](path)
        self._rows: Sequence[int] = range(len(self._table))
        if not self._rows:
            raise DataError(f"{path}: expected at least one record, got an empty data set")
        for row, record in enumerate(self._table):
            read_candidate(record, layout, self._where(row), {})

    def __len__(self) -> int:
        """The number of rows of one epoch."""
        return len(self._rows)

    def keep(self, is_kept: Callable[[Messages, str], bool]) -> None:
        """Removes rows from every epoch.

        Args:
            is_kept: called with a row's prompt, and with its file and line for errors.

        Raises:
            DataError: no row is left.
        """
        places = ((row, self._where(row), record) for row, record in enumerate(self._table))
        self._rows = [
            row
            for row, where, record in places
            if is_kept(read_messages(record, self._layout, where), where)
        ]
        if not self._rows:
            raise DataError(
                f"{self._path}: expected prompts besides the held-out ones, got none: lower "
                "data.num_held_out, or give a larger file"
            )

    def candidate(self, seed: int, position: int, attempt: int = 0) -> Candidate:
        """The row at a position of the shuffled stream; each attempt shuffles in its own order."""
        epoch, place = divmod(position, len(self._rows))
        order = _permutation(len(self._rows), derive_seed(seed, epoch, attempt))
        row = self._rows[int(order[place])]
        record = self._table.record(row)
        return read_candidate(record, self._layout, self._where(row), _as_json(record))

    def _where(self, row: int) -> str:
        return f"{self._path}, {self._table.place(row)}"


class _Jsonl:
    def __init__(self, path: str) -> None:
        self._lines: list[int] = []
        self._records: list[dict[str, Any]] = []
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:  # malformed JSON, or not UTF-8
                    raise DataError(
                        f"{path}, line {number}: expected a JSON object, got {error}"
                    ) from None
                if not isinstance(record, dict):
                    raise DataError(
                        f"{path}, line {number}: expected a JSON object, got a "
                        f"{type(record).__name__}"
                    )
                self._lines.append(number)
                self._records.append(record)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records)

    def record(self, row: int) -> dict[str, Any]:
        return self._records[row]

    def place(self, row: int) -> str:
        return f"line {self._lines[row]}"


class _Parquet:
    def __init__(self, path: str) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            self._table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: expected a Parquet file, got {error}") from None

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()

    def record(self, row: int) -> dict[str, Any]:
        return self._table.slice(row, 1).to_pylist()[0]

    def place(self, row: int) -> str:
        return f"row {row}"


@lru_cache(maxsize=16)
def _permutation(num_rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num_rows)


def _as_json(record: dict[str, Any]) -> dict[str, Any]:
    # Parquet contains dates, decimals and bytes, but verifiers get their metadata as JSON.
    return json.loads(json.dumps(record, default=str))
