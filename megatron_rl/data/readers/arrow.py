"""Reads Parquet and Arrow files, batch by batch, with pyarrow.

Arrow files are those of Hugging Face data sets on disk (a stream of record batches), or Arrow's own
file format. A column that a Hugging Face data set declares as a ClassLabel is read as the names of
its classes, not as their numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.data.readers.batch import RowBatch
from megatron_rl.data.readers.columns import hash_values
from megatron_rl.errors import DataError

if TYPE_CHECKING:
    import pyarrow

ROWS = 2**15  # of one batch, at most; with more, fewer texts are hashed twice
BATCH_BYTES = 32 * 2**20  # of one batch, by the file's own account of its size
SMALLER = 64  # how much smaller the batches become if a column of one exceeds Arrow's 2 GiB


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[RowBatch]:
    """The rows of a Parquet file.

    Args:
        columns: names of columns, or dotted paths into them, that are converted for every row.

    Raises:
        DataError: it is not a Parquet file, is damaged, or holds a value that cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # One buffer, not the whole column of a row group, is in memory for each column.
        file = pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a Parquet file, got {_brief(error)}") from None
    with file:
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
        first = 0
        for batch in _record_batches(file, path):
            share = (first + batch.num_rows) / num_rows
            yield _row_batch(batch, first, schema, columns, path=path, share=share)
            first += batch.num_rows


def _record_batches(file: Any, path: Path) -> Iterator[pyarrow.RecordBatch]:
    """The record batches of a Parquet file. pyarrow cannot read a batch in which a nested column
    has more than 2 GiB of text, but it can read smaller ones.
    """
    import pyarrow

    rows, num_done = _rows_of_batch(file.metadata), 0
    while True:
        num_passed = 0
        try:
            for batch in file.iter_batches(batch_size=rows, use_threads=False):
                num_passed += batch.num_rows
                num_new = min(num_passed - num_done, batch.num_rows)
                if num_new > 0:
                    num_done += num_new
                    yield batch.slice(batch.num_rows - num_new)
            return
        except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowCapacityError) as error:
            if rows == 1:
                raise DataError(
                    f"{path}, row {num_done}: expected a row that pyarrow reads, got "
                    f"{_brief(error)}"
                ) from None
            rows = max(1, rows // SMALLER)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path}, after row {num_done}: expected a whole Parquet file, got {_brief(error)}"
            ) from None


def _rows_of_batch(metadata: Any) -> int:
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
    return max(1, min(ROWS, int(BATCH_BYTES / max(largest, 1))))


def read_arrow(path: Path, columns: Sequence[str]) -> Iterator[RowBatch]:
    """The rows of an Arrow file; arguments and errors as in `read_parquet`."""
    import pyarrow

    num_bytes = max(path.stat().st_size, 1)
    try:
        with pyarrow.OSFile(str(path)) as source:
            reader, first = _open_arrow(source), 0
            for number, whole in enumerate(_arrow_batches(reader), start=1):
                num_batches = getattr(reader, "num_record_batches", 0)  # a stream has none
                share = number / num_batches if num_batches else source.tell() / num_bytes
                for start in range(0, whole.num_rows, ROWS):
                    batch = whole.slice(start, ROWS)
                    yield _row_batch(batch, first, reader.schema, columns, path=path, share=share)
                    first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected an Arrow file, got {_brief(error)}") from None


def _open_arrow(source: pyarrow.NativeFile) -> Any:
    import pyarrow.ipc

    is_file_format = source.read(6) == b"ARROW1"
    source.seek(0)
    return pyarrow.ipc.open_file(source) if is_file_format else pyarrow.ipc.open_stream(source)


def _arrow_batches(reader: Any) -> Iterator[pyarrow.RecordBatch]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _row_batch(
    batch: pyarrow.RecordBatch,
    first: int,
    schema: pyarrow.Schema,
    columns: Sequence[str],
    *,
    path: Path,
    share: float,
) -> RowBatch:
    labels = _class_labels(schema)
    names = _top_level(columns, schema.names)
    wanted = batch if names is None else batch.select(names)

    def records(of: pyarrow.RecordBatch, positions: Sequence[int]) -> list[dict[str, Any]]:
        if len(positions) < of.num_rows:
            of = of.take(list(positions)) if positions else of.slice(0, 0)
        return _to_records(of, labels, [first + position for position in positions], path)

    return RowBatch(
        numbers=range(first, first + batch.num_rows),
        unit="row",
        share=share,
        hashes=lambda: _hashes(wanted, columns, lambda: records(wanted, range(wanted.num_rows))),
        partial=partial(records, wanted),
        whole=partial(records, batch),
    )


def _hashes(
    batch: pyarrow.RecordBatch,
    columns: Sequence[str],
    records: Callable[[], list[dict[str, Any]]],
) -> Sequence[int]:
    """Hashes of the columns; from the records if pyarrow cannot compare the values."""
    import pyarrow

    from megatron_rl.data.readers.arrow_hash import hash_array

    try:
        arrays = [_array_at(batch, column) for column in columns]
        row = pyarrow.StructArray.from_arrays(arrays, [str(n) for n in range(len(arrays))])
        return hash_array(row).tolist()
    except (KeyError, ValueError, pyarrow.ArrowNotImplementedError):
        return hash_values(records(), columns)


def _array_at(batch: pyarrow.RecordBatch, column: str) -> pyarrow.Array:
    """The array at a dotted path, through the fields of structs; KeyError if there is none."""
    import pyarrow.compute

    [name] = _top_level([column], batch.schema.names) or [""]
    array, rest = batch.column(name), column[len(name) + 1 :]
    while rest:
        head, _, rest = rest.partition(".")
        if not pyarrow.types.is_struct(array.type) or array.type.get_field_index(head) < 0:
            raise KeyError(column)
        array = pyarrow.compute.struct_field(array, head)  # null where the struct is
    return array


def _top_level(columns: Sequence[str], names: Sequence[str]) -> list[str] | None:
    """The file's columns that hold the columns asked for; None, which is all, if one is missing, so
    that a message can list them.
    """
    wanted: dict[str, None] = {}
    for column in columns:
        parts = column.split(".")
        heads = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        found = [name for name in heads if name in names]
        if not found:
            return None
        wanted.update(dict.fromkeys(found))
    return list(wanted)


def _class_labels(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Column -> names of its classes, from the features that `datasets` writes into a schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError):
        return {}


def _to_records(
    batch: pyarrow.RecordBatch, labels: dict[str, list[str]], numbers: Sequence[int], path: Path
) -> list[dict[str, Any]]:
    try:
        records = batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a time beyond Python's range
        raise _bad_row(batch, numbers, path) from None
    for name, classes in labels.items():
        if name in batch.schema.names:
            for record in records:
                value = record[name]
                record[name] = classes[value] if value is not None and value >= 0 else None
    return records


def _bad_row(batch: pyarrow.RecordBatch, numbers: Sequence[int], path: Path) -> DataError:
    for position, number in zip(range(batch.num_rows), numbers, strict=False):
        try:
            batch.slice(position, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            return DataError(f"{path}, row {number}: expected readable values, got {error}")
    return DataError(f"{path}: expected readable values")


def _brief(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
