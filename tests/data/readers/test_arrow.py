"""Parquet and Arrow: any number of row groups and batches, nested columns over many of them."""

import datetime
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.data.readers import arrow
from megatron_rl.data.readers.arrow import read_arrow, read_parquet
from megatron_rl.errors import DataError


def chat(n):
    return {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"{n}+1" * n}],
        "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
        "extra": {"id": n},
    }


ROWS = [chat(n) for n in range(100)]
COLUMNS = ("prompt", "reward_model.ground_truth")


def write_parquet(path, rows=ROWS, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write_stream(path, table, rows=7):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_file(path, table, rows=7):
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def whole_rows(batches):
    found, numbers = [], []
    for batch in batches:
        found += batch.whole(range(len(batch.numbers)))
        numbers += batch.numbers
        assert batch.unit == "row" and 0 < batch.share <= 1
    assert numbers == list(range(len(found)))
    return found


@pytest.mark.parametrize("row_group", [1, 7, 1000])
@pytest.mark.parametrize("rows", [1, 3, 4096])
def test_parquet_in_any_pieces(row_group, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "ROWS", rows)
    path = write_parquet(tmp_path / "a.parquet", row_group_size=row_group)
    assert whole_rows(read_parquet(path, COLUMNS)) == ROWS
    batches = list(read_parquet(path, COLUMNS))
    assert batches[-1].share == 1.0
    assert batches[0].partial([0])[0].keys() == {"prompt", "reward_model"}
    assert batches[0].whole([0]) == [ROWS[0]]
    assert batches[0].whole([]) == []


def test_the_batch_is_small_if_the_rows_are_large(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [chat(n) for n in range(200, 300)])
    monkeypatch.setattr(arrow, "BATCH_BYTES", 5000)
    assert max(len(batch.numbers) for batch in read_parquet(path, COLUMNS)) < 20


def test_a_missing_column_reads_all_so_that_a_message_can_name_them(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    [batch] = read_parquet(path, ("prompt", "answer"))
    assert batch.partial([0])[0].keys() == {"prompt", "reward_model", "extra"}
    assert batch.whole([3]) == [ROWS[3]]


def test_a_column_whose_name_has_a_dot(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"a.b": "x", "a": {"b": "y"}, "c": 1}])
    [batch] = read_parquet(path, ("a.b",))
    assert batch.partial([0]) == [{"a.b": "x", "a": {"b": "y"}}]


class WideFile:
    """Stands in for a Parquet file of 10 rows of which pyarrow reads only `limit` at once."""

    def __init__(self, limit, error=pa.ArrowNotImplementedError):
        self.limit, self.error, self.sizes = limit, error, []
        self.metadata = pq.ParquetFile(self._small()).metadata

    def _small(self):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"n": range(10)}), sink)
        return pa.BufferReader(sink.getvalue())

    def iter_batches(self, *, batch_size, use_threads):
        self.sizes.append(batch_size)
        table = pa.table({"n": range(10)})
        for start in range(0, 10, batch_size):
            # Rows from 4 on are the large ones.
            if start + batch_size > 4 and batch_size > self.limit:
                raise self.error(
                    "Nested data conversions not implemented for chunked array outputs"
                )
            yield from table.slice(start, batch_size).to_batches()


@pytest.mark.parametrize("error", [pa.ArrowNotImplementedError, pa.ArrowCapacityError])
def test_batches_become_smaller_where_a_nested_column_exceeds_2_gib(error, tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "ROWS", 4)
    monkeypatch.setattr(arrow, "SMALLER", 2)
    file = WideFile(1, error)
    batches = list(arrow._record_batches(file, tmp_path))
    assert [n for batch in batches for n in batch["n"].to_pylist()] == list(range(10))
    assert file.sizes == [4, 2, 1]
    assert [batch.num_rows for batch in batches][:2] == [4, 1]


def test_a_row_that_cannot_be_read_at_all_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "ROWS", 4)
    with pytest.raises(DataError, match=r"row 4: expected a row that pyarrow reads, got Nested"):
        list(arrow._record_batches(WideFile(0), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("is_equal", [False, True])
def test_more_than_2_gib_of_text_in_a_nested_column(is_equal, tmp_path):
    """Equal texts are stored once, so that the file's own account of its size is far too small."""
    num, length = (4480, 600_000) if is_equal else (22_000, 100_000)
    texts = ["y" * length] * 64 if is_equal else [f"{n} ".ljust(length, "y") for n in range(500)]
    part = pa.table({"prompt": [[{"role": "user", "content": text}] for text in texts]})
    path = tmp_path / "a.parquet"
    pq.write_table(pa.concat_tables([part] * (num // len(texts))), path, row_group_size=num)
    del part
    num_read = 0
    for batch in read_parquet(path, ("prompt",)):
        records = batch.partial(range(len(batch.numbers)))
        assert all(len(record["prompt"][0]["content"]) == length for record in records)
        num_read += len(records)
    assert num_read == num


@pytest.mark.parametrize("write", [write_stream, write_file])
def test_arrow_in_both_formats(write, tmp_path):
    path = write(tmp_path / "a.arrow", pa.Table.from_pylist(ROWS))
    assert whole_rows(read_arrow(path, COLUMNS)) == ROWS


@pytest.mark.parametrize("reader", ["parquet", "arrow"])
def test_the_names_of_classes(reader, tmp_path):
    features = {
        "answer": {"names": ["A", "B", "C"], "_type": "ClassLabel"},
        "q": {"_type": "Value"},
    }
    table = pa.table({"q": ["x", "y", "z"], "answer": [2, 0, None]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    if reader == "arrow":
        batches = read_arrow(write_stream(tmp_path / "a.arrow", table), ("q",))
    else:
        pq.write_table(table, tmp_path / "a.parquet")
        batches = read_parquet(tmp_path / "a.parquet", ("answer",))
    rows = whole_rows(batches)
    assert [row["answer"] for row in rows] == ["C", "A", None]


def test_values_of_other_types(tmp_path):
    row = {
        "day": datetime.date(2026, 1, 2),
        "price": Decimal("1.50"),
        "raw": b"\x00",
        "none": None,
        "list": [1, None],
    }
    path = write_parquet(tmp_path / "a.parquet", [row])
    assert whole_rows(read_parquet(path, ("day",))) == [row]


@pytest.mark.parametrize("reader", ["parquet", "arrow"])
def test_files_that_are_none(reader, tmp_path):
    path = tmp_path / f"a.{reader}"
    read = read_parquet if reader == "parquet" else read_arrow
    kind = "a Parquet" if reader == "parquet" else "an Arrow"
    for content in (b"", b"PAR1 not really", b"\xff\xff\xff\xff\x10\x00\x00\x00", b"ARROW1 no"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.{reader}: expected {kind} file, got") as caught:
            list(read(path, ()))
        assert "\n" not in str(caught.value)


def test_a_cut_file(tmp_path):
    path = write_stream(tmp_path / "a.arrow", pa.Table.from_pylist(ROWS))
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"a\.arrow: expected an Arrow file, got"):
        list(read_arrow(path, COLUMNS))
    path = write_parquet(tmp_path / "a.parquet", row_group_size=10)
    content = bytearray(path.read_bytes())
    content[1000:2000] = bytes(1000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet, after row \d+: expected a whole Parquet"):
        list(read_parquet(path, COLUMNS))


def test_text_that_is_not_utf8_names_the_row(tmp_path):
    good = pa.array([b"a", b"b", b"\xff\xfe", b"d"]).view(pa.string())
    pq.write_table(pa.table({"q": good}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet, row 2: expected readable values, got 'utf-8'"
    ):
        whole_rows(read_parquet(tmp_path / "a.parquet", ("q",)))


def test_hashes_are_of_the_columns_that_were_asked_for(tmp_path):
    rows = [chat(n) | {"extra": {"id": index}} for index, n in enumerate((0, 1, 0, 2, 1))]
    rows[3]["reward_model"]["style"] = "another"
    rows.append(rows[3] | {"reward_model": {"ground_truth": "3", "style": "rule"}})
    [batch] = read_parquet(write_parquet(tmp_path / "a.parquet", rows), COLUMNS)
    hashes = batch.hashes()
    assert hashes[0] == hashes[2] and hashes[1] == hashes[4] and hashes[3] == hashes[5]
    assert len(set(hashes)) == 3


def test_a_struct_that_is_null_hashes_as_no_value(tmp_path):
    """Arrow keeps a value below a null struct, which must not count."""
    below = pa.array(["7", "7", "8"])
    answers = pa.StructArray.from_arrays([below], ["truth"], mask=pa.array([False, True, False]))
    pq.write_table(pa.table({"q": ["x", "x", "x"], "a": answers}), tmp_path / "a.parquet")
    [batch] = read_parquet(tmp_path / "a.parquet", ("q", "a.truth"))
    assert len(set(batch.hashes())) == 3


@pytest.mark.parametrize("path", ["turns.0.t", "turns.9", "none", "turns.0.t.x"])
def test_paths_that_arrow_cannot_follow_hash_the_records(path, tmp_path):
    rows = [{"turns": [{"t": f"{n % 2}"}], "id": n} for n in range(4)]
    [batch] = read_parquet(write_parquet(tmp_path / "a.parquet", rows), (path,))
    assert len(set(batch.hashes())) == (4 if path == "none" else 2)  # all columns, or turns
