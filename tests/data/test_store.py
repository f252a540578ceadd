"""Records in memory and in a file without a name."""

import datetime
import errno
from decimal import Decimal

import pytest

from megatron_rl.data import store
from megatron_rl.data.store import RecordStore
from megatron_rl.errors import DataError


@pytest.mark.parametrize("num_bytes", [0, 10, 2**20])
def test_records_come_back_from_memory_and_from_a_file(num_bytes, monkeypatch, tmp_path):
    monkeypatch.setattr(store, "MEMORY_BYTES", num_bytes or 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    records = RecordStore()
    for number in range(50):
        records.add({"n": number, "text": "é\ud83d" * number})
        assert records.get(number // 2)["n"] == number // 2  # reading in between loses nothing
    assert len(records) == 50
    assert [records.get(row)["n"] for row in range(50)] == list(range(50))
    assert records.get(3)["text"] == "é\ud83d" * 3
    assert list(tmp_path.iterdir()) == []


def test_other_types_become_texts():
    records = RecordStore()
    records.add({"day": datetime.date(2026, 1, 2), "price": Decimal("1.50"), "none": None})
    assert records.get(0) == {"day": "2026-01-02", "price": "1.50", "none": None}


def test_the_digest_depends_on_every_column_and_on_the_order():
    def digest(*rows):
        records = RecordStore()
        for row in rows:
            records.add(row)
        return records.digest

    one, other = {"a": 1, "b": "x"}, {"a": 2, "b": "x"}
    digests = {
        digest(),
        digest(one),
        digest(one, other),
        digest(other, one),
        digest(one, other | {"b": "y"}),
        digest(one, other, one),
    }
    assert len(digests) == 6
    assert digest(one, other) == digest(dict(one), dict(other))


def test_a_full_disk_is_one_line(monkeypatch):
    records = RecordStore()

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records._file, "write", fail)
    with pytest.raises(DataError, match=r"expected room for the rows in .* No space left .*TMPDIR"):
        records.add({"a": 1})
