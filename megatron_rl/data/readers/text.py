"""Reads JSONL, JSON and CSV: UTF-8 text, with or without a byte-order mark, lines ending in LF or
CRLF. An error names the file and the line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rl.data.readers.batch import RowBatch, batch_of_lines
from megatron_rl.errors import DataError

ROWS = 1024  # of one batch
CHUNK = 2**20  # characters of a JSON list that are read together
_MARK = "\ufeff"  # the byte-order mark of UTF-8, decoded
_OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_JSON_SPACE = " \t\n\r"
_LONGEST_WORD = 16  # more than -Infinity or an escape in a text has


def read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[RowBatch]:
    """The objects of a file with one JSON object a line; empty lines are skipped.

    Raises:
        DataError: a line is not a JSON object in UTF-8.
    """
    return _batches(path, columns, _objects)


def _objects(file: io.BufferedReader, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(file, path):
        # Files that were joined have a mark in the middle.
        text = line.removeprefix(_MARK)
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            column = min(error.pos, len(text.rstrip())) + 1  # what is cut off ends before its line
            raise DataError(
                f"{where}: expected a JSON object, got {error.msg} at column {column}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected a JSON object, got {error}") from None
        yield number, _object(record, where)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        hint = "; a list of objects belongs into a .json file" if isinstance(value, list) else ""
        found = "a list" if isinstance(value, list) else repr(value)[:60]
        raise DataError(f"{where}: expected a JSON object, got {found}{hint}")
    return value


def _lines(file: io.BufferedReader, path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            _check_encoding(line, path)
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: expected UTF-8, got {error}") from None


def _check_encoding(start: bytes, path: Path) -> None:
    name = _OTHER_MARKS.get(start[:2])
    if name:
        raise DataError(
            f"{path}: expected UTF-8, got {name}: convert it with iconv -f {name} -t UTF-8"
        )


def read_json(path: Path, columns: Sequence[str]) -> Iterator[RowBatch]:
    """The objects of a JSON list; or, as many files of this name hold, one object a line.

    The list is read in pieces, so that memory does not grow with the file.

    Raises:
        DataError: the file is neither.
    """
    with path.open("rb") as file:
        start = file.read(4096)
        _check_encoding(start, path)
    if start.decode("utf-8", "replace").removeprefix(_MARK).lstrip()[:1] != "[":
        try:
            yield from read_jsonl(path, columns)
        except DataError as error:
            raise DataError(f"{error}; a .json file holds a list, or one object a line") from None
        return
    num_bytes = path.stat().st_size
    with path.open(encoding="utf-8-sig", newline="") as file:
        items = iter(_ListReader(file, path))
        while batch := list(islice(items, ROWS)):
            yield batch_of_lines(batch, columns, file.buffer.tell() / num_bytes)


class _ListReader:
    """Line and value of each object of a JSON list, decoded from a sliding piece of the text."""

    def __init__(self, text: io.TextIOWrapper, path: Path) -> None:
        self._text = text
        self._path = path
        self._decoder = json.JSONDecoder()
        self._piece = ""
        self._position = 0
        self._line = 1

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
        else:
            yield self._item()
            while self._peek() == ",":
                self._expect(",")
                yield self._item()
            self._expect("]")
        if rest := self._peek():
            raise self._error("nothing after the list", rest)

    def _item(self) -> tuple[int, dict[str, Any]]:
        if (first := self._peek()) != "{":
            raise self._error("a JSON object", first or "the end of the file")
        size = CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._piece, self._position)
                break
            except RecursionError as error:
                raise self._error("a JSON object", str(error)) from None
            except json.JSONDecodeError as error:
                # Pieces grow, so that a large object is not decoded once for every chunk.
                if not _may_be_cut(error) or not self._read_more(size):
                    self._move(error.pos)
                    raise self._error("a JSON object", error.msg) from None
                size *= 2
        line = self._line
        self._move(end)
        return line, value

    def _peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            end = self._position
            while end < len(self._piece) and self._piece[end] in _JSON_SPACE:
                end += 1
            self._move(end)
            if end < len(self._piece):
                return self._piece[end]
            if not self._read_more(CHUNK):
                return ""

    def _expect(self, character: str) -> None:
        if (found := self._peek()) != character:
            raise self._error(f"{character!r}", found or "the end of the file")
        self._move(self._position + 1)

    def _move(self, end: int) -> None:
        self._line += self._piece.count("\n", self._position, end)
        self._position = end

    def _read_more(self, size: int) -> bool:
        try:
            more = self._text.read(size)
        except UnicodeDecodeError as error:
            raise self._error("UTF-8", str(error)) from None
        self._piece = self._piece[self._position :] + more
        self._position = 0
        return bool(more)

    def _error(self, expected: str, got: str) -> DataError:
        return DataError(f"{self._path}, line {self._line}: expected {expected}, got {got}")


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    """Whether the text ended in the middle of an object; otherwise the object is malformed."""
    is_at_end = error.pos > len(error.doc) - _LONGEST_WORD
    return is_at_end or error.msg.startswith("Unterminated string")


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[RowBatch]:
    """The rows of a CSV file (.tsv: separated by tabs) whose first line names the columns; every
    value is a text.

    Raises:
        DataError: the header or a row is malformed.
    """
    return _batches(path, columns, _csv_rows)


def _batches(
    path: Path,
    columns: Sequence[str],
    rows_of: Callable[[io.BufferedReader, Path], Iterator[tuple[int, dict[str, Any]]]],
) -> Iterator[RowBatch]:
    """The numbered rows of a file in batches, each with the share of the file that was read."""
    num_bytes = max(path.stat().st_size, 1)
    with path.open("rb") as file:
        rows = rows_of(file, path)
        while batch := list(islice(rows, ROWS)):
            yield batch_of_lines(batch, columns, file.tell() / num_bytes)


def _csv_rows(file: io.BufferedReader, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # of the module; its default is 128 KiB
    texts = (
        line.removeprefix(_MARK) if number == 1 else line for number, line in _lines(file, path)
    )
    reader = csv.reader(texts, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    names: list[str] | None = None
    line = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: expected a row of CSV, got {error}") from None
        if row is None:
            return
        if names is None:
            names = _header(row, path)
        elif row and len(row) != len(names):
            raise DataError(
                f"{path}, line {line}: expected {len(names)} values, as many as the first line "
                f"has, got {len(row)}"
            )
        elif row:
            yield line, dict(zip(names, row, strict=True))
        line = reader.line_num + 1


def _header(row: list[str], path: Path) -> list[str]:
    if not all(row) or len(set(row)) != len(row):
        raise DataError(f"{path}, line 1: expected different names of columns, got {row}")
    return row
