"""JSONL, JSON and CSV as users have them: marks, line ends, broken rows; errors name the line."""

import json

import pytest

from megatron_rl.data.readers import text
from megatron_rl.data.readers.text import read_csv, read_json, read_jsonl
from megatron_rl.errors import DataError

COLUMNS = ("a",)


def rows_of(batches):
    """(number, record) of every row; whole records are those of the batch."""
    found = []
    for batch in batches:
        records = batch.whole(range(len(batch.numbers)))
        assert batch.partial([0]) == batch.whole([0]) == records[:1]
        assert batch.unit == "line"
        assert batch.place(0) == f"line {batch.numbers[0]}"
        assert 0 < batch.share <= 1
        assert len(batch.hashes()) == len(records)
        found += zip(batch.numbers, records, strict=True)
    return found


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n\n{"a": "\xc3\xa9"}\n',
        b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "\xc3\xa9"}',  # a mark, CRLF, no last line end
        b'{"a": 1}\n \n\xef\xbb\xbf{"a": "\xc3\xa9"}\n',  # two files joined, each with a mark
        b'{"a": 1}\n\n{"a": "\\u00e9"}\n',
    ],
)
def test_jsonl(content, write):
    assert rows_of(read_jsonl(write("a.jsonl", content), COLUMNS)) == [
        (1, {"a": 1}),
        (3, {"a": "é"}),
    ]


def test_a_line_separator_within_a_text_ends_no_line(write):
    content = '{"a": "x\u2028y\u0085z"}\n{"a": 2}\n'.encode()
    assert [number for number, _ in rows_of(read_jsonl(write("a.jsonl", content), COLUMNS))] == [
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": ', r"line 2: .*got Expecting value at column 6$"),
        (b'{"a": 1}\n{"a": 1\n', r"line 2: .*got Expecting ',' delimiter at column 8$"),
        (b'{"a": 1}\n[1]', r"line 2: .*got a list; a list of objects belongs into a \.json file"),
        (b'{"a": 1}\n7', r"line 2: expected a JSON object, got 7$"),
        (b'{"a": 1}\n{"a": "\xff"}', r"line 2: expected UTF-8, got .*byte 0xff"),
        ('{"a": 1}\n'.encode("utf-16"), r"expected UTF-8, got UTF-16: convert it with iconv"),
        (b'{"a": 1}\n' + b"[" * 100_000, r"line 2: expected a JSON object, got .*recursion"),
        (b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}", r"line 2: expected a JSON object, got .*digits"),
        (b'{"a": 1}\r{"a": 2}', r"line 1: expected a JSON object, got Extra data"),
    ],
)
def test_broken_jsonl(content, message, write):
    with pytest.raises(DataError, match=rf"a\.jsonl,? ?.*{message}") as caught:
        rows_of(read_jsonl(write("a.jsonl", content), COLUMNS))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
@pytest.mark.parametrize(
    "content",
    [
        b'[{"a": 1},\n {"a": "\xc3\xa9"}]',
        b'\xef\xbb\xbf  [\r\n{"a": 1} ,\r\n{\r\n"a": "\xc3\xa9"}\r\n]\r\n',
    ],
)
def test_a_json_list_in_pieces_of_any_size(content, chunk, write, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", chunk)
    rows = rows_of(read_json(write("a.json", content), COLUMNS))
    assert [record for _, record in rows] == [{"a": 1}, {"a": "é"}]
    assert [number for number, _ in rows] == ([1, 2] if content.startswith(b"[") else [2, 3])


def test_an_empty_list_has_no_rows(write):
    assert rows_of(read_json(write("a.json", b" [ ] \n"), COLUMNS)) == []


def test_a_list_longer_than_a_batch_is_whole(write, monkeypatch):
    records = [{"n": n, "text": "x" * (n % 50), "deep": [{"m": -1.5e-3}]} for n in range(3000)]
    path = write("a.json", json.dumps(records, indent=1).encode())
    monkeypatch.setattr(text, "CHUNK", 1000)
    assert [record for _, record in rows_of(read_json(path, COLUMNS))] == records


def test_a_json_file_may_hold_an_object_a_line(write):
    assert rows_of(read_json(write("a.json", b'{"a": 1}\n{"a": 2}\n'), COLUMNS)) == [
        (1, {"a": 1}),
        (2, {"a": 2}),
    ]


@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n{"a" 2}]', r"line 2: expected a JSON object, got Expecting ':'"),
        (b'[{"a": 1},\n{"a": "x', r"line 2: expected a JSON object, got Unterminated string"),
        (b'[{"a": 1},\n{"a": 2', r"line 2: expected a JSON object, got Expecting ',' delimiter"),
        (b'[{"a": 1},\n7]', r"line 2: expected a JSON object, got 7"),
        (b'[{"a": 1},\n]', r"line 2: expected a JSON object, got \]"),
        (b'[{"a": 1}\n', r"line 2: expected '\]', got the end of the file"),
        (b'[{"a": 1}]\n{"a": 2}', r"line 2: expected nothing after the list, got \{"),
        (b'[{"a": 1},\n{"a": "\xff"}]', r"expected UTF-8, got .*byte 0xff"),
        (b'{"a": 1,\n"b": 2}', r"line 1: .*; a \.json file holds a list, or one object a line"),
        ('[{"a": 1}]'.encode("utf-16"), r"expected UTF-8, got UTF-16"),
    ],
)
def test_broken_json(content, message, chunk, write, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", chunk)
    with pytest.raises(DataError, match=message) as caught:
        rows_of(read_json(write("a.json", content), COLUMNS))
    assert "\n" not in str(caught.value)


def test_a_malformed_object_does_not_make_the_whole_file_be_read(write):
    path = write("a.json", b'[{"a" 1}' + b" " * 10_000_000 + b"]")
    reader = read_json(path, COLUMNS)
    with pytest.raises(DataError, match="line 1"):
        next(reader)


def test_csv(write):
    content = b'\xef\xbb\xbfq,"a"\r\n"two\r\nlines, quoted ""x""",007\r\n\r\nplain,1e5\r\n'
    assert rows_of(read_csv(write("a.csv", content), COLUMNS)) == [
        (2, {"q": 'two\r\nlines, quoted "x"', "a": "007"}),
        (5, {"q": "plain", "a": "1e5"}),
    ]
    assert rows_of(read_csv(write("a.tsv", b"q\ta\n1,5\t2\n"), COLUMNS)) == [
        (2, {"q": "1,5", "a": "2"})
    ]


def test_a_csv_field_may_be_long(write):
    [(_, record)] = rows_of(read_csv(write("a.csv", b"q,a\n" + b"x" * 200_000 + b",1\n"), COLUMNS))
    assert len(record["q"]) == 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q,a\n1,2\n3\n", r"line 3: expected 2 values, as many as the first line has, got 1"),
        (b"q,a\n1,2,3\n", r"line 2: expected 2 values, .* got 3"),
        (b'q,a\n"x\ny",2,3\n', r"line 2: expected 2 values"),
        (b'q,a\n1,2\n"open,3\n', r"line 3: expected a row of CSV, got unexpected end of data"),
        (b"q,q\n1,2\n", r"line 1: expected different names of columns, got \['q', 'q'\]"),
        (b"q,\n1,2\n", r"line 1: expected different names of columns"),
        (b"q,a\n1,\xff\n", r"line 2: expected UTF-8"),
    ],
)
def test_broken_csv(content, message, write):
    with pytest.raises(DataError, match=rf"a\.csv, {message}") as caught:
        rows_of(read_csv(write("a.csv", content), COLUMNS))
    assert "\n" not in str(caught.value)
