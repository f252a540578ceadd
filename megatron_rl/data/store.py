"""Holds the records of a data set as JSON: small ones in memory, others in a temporary file that
has no name and disappears with the process.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from typing import Any

import xxhash

from megatron_rl.errors import DataError

MEMORY_BYTES = 64 * 2**20  # beyond which the records move to a file in TMPDIR


class RecordStore:
    """Records in the order in which they were added. They are copies, so that a run does not notice
    if a file of it changes.

    Raises:
        DataError: TMPDIR is full or cannot be written.
    """

    def __init__(self) -> None:
        # It lives as long as the store, so no `with` can close it.
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115
        self._ends = array("Q", [0])
        self._is_at_end = True
        self._digest = xxhash.xxh3_128()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def digest(self) -> str:
        """A hash of all records, with all their columns, and of their order."""
        return self._digest.hexdigest()

    def add(self, record: dict[str, Any]) -> None:
        """Append a record. Dates, decimals and bytes, which Parquet contains, become texts."""
        line = json.dumps(record, default=str).encode() + b"\n"
        try:
            if not self._is_at_end:  # seeking would flush the buffer for every record
                self._file.seek(0, os.SEEK_END)
            self._is_at_end = True
            self._file.write(line)
        except OSError as error:
            raise _no_room(error) from error
        self._digest.update(line)
        self._ends.append(self._ends[-1] + len(line))

    def get(self, row: int) -> dict[str, Any]:
        """The record of a row, as plain JSON values."""
        start, end = self._ends[row], self._ends[row + 1]
        self._is_at_end = False
        try:
            self._file.seek(start)
            return json.loads(self._file.read(end - start))
        except OSError as error:
            raise _no_room(error) from error


def _no_room(error: OSError) -> DataError:
    return DataError(
        f"data: expected room for the rows in {tempfile.gettempdir()}, got {error.strerror}: free "
        "some space there, or set TMPDIR to another folder"
    )
