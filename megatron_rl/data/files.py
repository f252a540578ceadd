"""The stream of candidates from data files: every row once per epoch, in a new order in each epoch.

The order of an epoch is a function of (seed, epoch). With N rows, position p of the stream is
position p mod N of epoch p div N. Rows that repeat an earlier row are left out, unless they are
asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_rl.data.candidate import (
    SYSTEM,
    Candidate,
    Layout,
    Messages,
    check_template,
    read_answer,
    read_candidate,
    read_turns,
)
from megatron_rl.data.mixture import derive_seed
from megatron_rl.data.paths import KINDS, data_files
from megatron_rl.data.readers.arrow import read_arrow, read_parquet
from megatron_rl.data.readers.batch import RowBatch
from megatron_rl.data.readers.text import read_csv, read_json, read_jsonl
from megatron_rl.data.store import RecordStore
from megatron_rl.data.watch import Silence, Watch
from megatron_rl.errors import DataError

PATH_KEY = "data.tasks[].path"
REFUSED = -1  # in the place of a row's number
_MAX_VALUES = 2**18  # that are compared as they are in the file
_NOTICE_ROWS = 256  # between two reports of progress


class FileSource:
    """The rows of data files. All are read once when it is opened, so that a bad row is found at
    the start of a run.

    Args:
        path: see `data_files`.
        name: of the data in messages.
        path_key: the setting that names the files, for messages.
        has_repeats: whether rows with the prompt and the answer of an earlier row are kept.
        check_answer: raises ValueError for an answer that the task's verifier cannot read.
        drops_unreadable: whether rows with such an answer are left out; else they are an error.
        watch: is told the progress, and how many rows repeat others.

    Raises:
        DataError: the files are missing, empty, malformed or of an unsupported kind, or a row lacks
            a column or its text (the message names file and line or row).
        ConfigError: see `check_template`.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        layout: Layout,
        *,
        name: str = "",
        path_key: str = PATH_KEY,
        has_repeats: bool = False,
        check_answer: Callable[[str], None] | None = None,
        drops_unreadable: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self._files = data_files(path, path_key)
        self._name = name or str(path)
        self._layout = layout
        self._has_repeats = has_repeats
        self._check_answer = check_answer
        self._drops_unreadable = drops_unreadable
        self._watch = watch or Silence()
        self._store = RecordStore()
        self._file_of = array("L")  # of each stored row, its index in _files
        self._numbers = array("Q")  # of each stored row, its line or row in the file
        self._units: list[str] = []  # of each file, "line" or "row"
        self._first_alike = array("Q")  # of each stored row, the first with its prompt and answer
        self._num_read = self._num_different = self._num_replaced = self._num_unreadable = 0
        self._read()
        self._rows: Sequence[int] = range(len(self._store))
        if not self._rows:
            raise DataError(f"{path}: expected at least one record, got an empty data set")
        check_template(self._store.get(0), layout)
        self._tell()

    def __len__(self) -> int:
        """The number of rows of one epoch."""
        return len(self._rows)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Tells these rows from others, as plain JSON values: their number, and a hash of all their
        columns in order. Rows that were left out as repeats are not part of it.
        """
        return {"num_rows": len(self._store), "digest": self._store.digest}

    def keep(self, is_kept: Callable[[Candidate, str], bool]) -> None:
        """Removes rows from every epoch.

        Args:
            is_kept: called with a row, and with its file and line for errors; once for rows with
                the same prompt and answer.

        Raises:
            DataError: no row is left.
        """
        verdicts = bytearray(len(self._store))
        for row, first in enumerate(self._first_alike):
            if first < row:
                verdicts[row] = verdicts[first]
                continue
            if row % _NOTICE_ROWS == 0:
                self._watch.progress(f"checking {self._name}", row / len(verdicts))
            verdicts[row] = is_kept(self._candidate(row), self._where(row))
        self._watch.progress(f"checking {self._name}", 1.0)
        self._rows = np.flatnonzero(np.frombuffer(verdicts, dtype=np.uint8))
        if not len(self._rows):
            raise DataError(
                f"{self._name}: expected prompts besides the held-out ones, got none: lower "
                "data.num_held_out, raise data.max_prompt_tokens, or give a larger file"
            )

    def row(self, number: int) -> Candidate:
        """The row of a number, 0 to len - 1, in the order of the files."""
        return self._candidate(int(self._rows[number]))

    def candidate(self, seed: int, position: int, attempt: int = 0) -> Candidate:
        """The row at a position of the shuffled stream; each attempt shuffles in its own order."""
        epoch, place = divmod(position, len(self._rows))
        order = _permutation(len(self._rows), derive_seed(seed, epoch, attempt))
        return self._candidate(int(self._rows[int(order[place])]))

    def sample(self, count: int) -> list[tuple[str, Candidate]]:
        """At most so many rows of an epoch, evenly spread over the files, each with its file and
        line.
        """
        places = np.linspace(0, len(self._rows) - 1, min(count, len(self._rows))).astype(int)
        rows = [int(self._rows[place]) for place in places]
        return [(self._where(row), self._candidate(row)) for row in rows]

    def _candidate(self, row: int) -> Candidate:
        record = self._store.get(row)
        return read_candidate(record, self._layout, self._where(row), record)

    def _read(self) -> None:
        columns = (self._layout.prompt_column, self._layout.answer_column)
        seen = _Seen()
        for index, path in enumerate(self._files):
            self._units.append("row")
            seen.next_file()
            for batch in _READERS[KINDS[path.suffix]](path, columns):
                self._units[-1] = batch.unit
                self._add(batch, index, seen)
                share = (index + batch.share) / len(self._files)
                self._watch.progress(f"reading {self._name}", share)
        self._watch.progress(f"reading {self._name}", 1.0)

    def _add(self, batch: RowBatch, index: int, seen: _Seen) -> None:
        layout = self._layout
        stored: list[int] = []
        positions: Sequence[int] = range(len(batch.numbers))
        # Repeats are found by their hashes where they can be, which is much faster.
        hashes = [] if self._has_repeats else batch.hashes()
        if hashes:
            positions = [position for position in positions if not seen.has(hashes[position])]
        for position, record in zip(positions, batch.partial(positions), strict=True):
            if hashes and seen.has(hashes[position]):
                continue
            where = f"{self._files[index]}, {batch.unit} {batch.numbers[position]}"
            turns = read_turns(record, layout, where)
            answer = read_answer(record, layout, where)
            row = len(self._first_alike)
            first_alike = seen.first(turns, answer, row)
            if first_alike == row and not self._is_readable(answer, where):
                first_alike = seen.refuse(turns, answer)
            if first_alike == REFUSED:
                self._num_unreadable += 1
                continue
            if hashes:
                seen.add(hashes[position])
            if first_alike < row and not self._has_repeats:
                continue
            stored.append(position)
            self._first_alike.append(first_alike)
            self._file_of.append(index)
            self._numbers.append(batch.numbers[position])
            has_system = any(role == SYSTEM for role, _ in turns)
            self._num_replaced += has_system and bool(layout.system_prompt)
        self._num_read += len(batch.numbers)
        self._num_different = seen.num_different
        for record in batch.whole(stored):
            self._store.add(record)

    def _is_readable(self, answer: str, where: str) -> bool:
        try:
            if self._check_answer is not None:
                self._check_answer(answer)
        except ValueError as error:
            if not self._drops_unreadable:
                verifier_key = f"{self._layout.answer_key.rpartition('.')[0]}.verifier"
                raise DataError(
                    f"{where}: column {self._layout.answer_column!r} ({self._layout.answer_key}): "
                    f"{error}: choose another {verifier_key}, or drop such rows by "
                    "data.unreadable_answers=drop"
                ) from None
            return False
        return True

    def _tell(self) -> None:
        if self._num_unreadable:
            self._watch.say(
                f"{self._name}: {self._num_unreadable:,} of {self._num_read:,} rows are dropped, "
                f"with an answer in column {self._layout.answer_column!r} that the task's verifier "
                "cannot read (data.unreadable_answers=drop)"
            )
        if num_repeats := self._num_read - self._num_different - self._num_unreadable:
            what = (
                "kept (data.repeats=drop takes them out)"
                if self._has_repeats
                else "taken out (data.repeats=keep keeps them)"
            )
            self._watch.say(
                f"{self._name}: {self._num_read:,} rows, {self._num_different:,} different; "
                f"{num_repeats:,} with the prompt and answer of an earlier row are {what}"
            )
        if self._num_replaced:
            self._watch.say(
                f"{self._name}: the system messages of {self._num_replaced:,} rows are replaced by "
                "system_prompt"
            )

    def _where(self, row: int) -> str:
        index = self._file_of[row]
        return f"{self._files[index]}, {self._units[index]} {self._numbers[row]}"


class _Seen:
    """The prompts and answers that have been read, by hashes of 128 bits, which no two of a billion
    texts share, and beside them the hashes of 64 bits that the readers make of the rows of a file.
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._num_refused = 0
        self._values: set[int] = set()

    @property
    def num_different(self) -> int:
        """The number of different pairs of prompt and answer that were not refused."""
        return len(self._rows) - self._num_refused

    def first(self, turns: Messages, answer: str, row: int) -> int:
        """The first row with this prompt and answer: `row` if there was none before, REFUSED if it
        was refused.
        """
        return self._rows.setdefault(_key(turns, answer), row)

    def refuse(self, turns: Messages, answer: str) -> int:
        """Take back that this prompt and answer were read, also for later rows; returns REFUSED."""
        self._rows[_key(turns, answer)] = REFUSED
        self._num_refused += 1
        return REFUSED

    def has(self, values: int) -> bool:
        """Whether a row of this file had columns of this hash. Rows with other ones may have the
        same prompt and answer; those `first` finds.
        """
        return values in self._values

    def add(self, values: int) -> None:
        """Remember the hash of a row; there is a limit, beyond which all are forgotten."""
        if len(self._values) >= _MAX_VALUES:
            self._values.clear()
        self._values.add(values)

    def next_file(self) -> None:
        """Forget the hashes, which may mean something else in another file."""
        self._values.clear()


def _key(turns: Messages, answer: str) -> int:
    texts = [answer, *(text for turn in turns for text in turn)]
    lengths = ",".join(str(len(text)) for text in texts)
    return xxhash.xxh3_128_intdigest(f"{lengths}:{''.join(texts)}".encode())


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[RowBatch]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}


@lru_cache(maxsize=16)
def _permutation(num_rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num_rows)
