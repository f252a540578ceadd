"""Rows of files on their way to a candidate: repeats, broken rows, every format."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.data import files
from megatron_rl.data.candidate import Layout
from megatron_rl.data.files import FileSource
from megatron_rl.errors import DataError
from tests.fakes.watch import LoggedWatch

PLAIN = Layout(prompt_column="q", answer_column="a", is_answer_required=True)
CHAT = Layout(prompt_column="prompt", answer_column="reward_model.ground_truth")


def dapo(n, **changes):
    return {
        "prompt": [{"content": f"Solve {n}", "role": "user"}],
        "reward_model": {"ground_truth": str(n), "style": "rule"},
        "extra_info": {"index": f"id-{n}"},
    } | changes


def write_as(kind, folder, rows):
    """The rows in a file, or a folder, of each kind; its path."""
    path = folder / f"data.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=4)
    elif kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    elif kind == "disk":
        path.mkdir()
        with pa.ipc.new_stream(path / "data-0.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        (path / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    elif kind == "folder":
        path.mkdir()
        pq.write_table(table.slice(0, 5), path / "part-0.parquet")
        pq.write_table(table.slice(5), path / "part-1.parquet")
    return str(path)


def read_all(source, seed=0):
    return [source.candidate(seed, position) for position in range(len(source))]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "disk", "folder"])
def test_every_kind_gives_the_same_rows(kind, tmp_path):
    rows = [{"q": f"What is {n}?", "a": f"{n:03}", "note": "x"} for n in range(10)]
    source = FileSource(write_as(kind, tmp_path, rows), PLAIN)
    candidates = read_all(source)
    assert sorted(each.answer for each in candidates) == [row["a"] for row in rows]
    assert sorted((each.metadata for each in candidates), key=lambda row: row["q"]) == rows
    jsonl = FileSource(write_as("jsonl", tmp_path, rows), PLAIN)
    assert read_all(jsonl, seed=3) == read_all(source, seed=3)  # the order too
    assert jsonl.fingerprint == source.fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "disk", "folder"])
def test_repeats_are_taken_out_and_told(kind, tmp_path):
    rows = [dapo(n) for n in (0, 1, 2, 0, 1, 0, 3)]
    rows[3] = dapo(0, extra_info={"index": "another"})  # the first one's columns are kept
    rows[6] = dapo(0, reward_model={"ground_truth": "7", "style": "rule"})  # another answer
    log = LoggedWatch()
    source = FileSource(write_as(kind, tmp_path, rows), CHAT, name="dapo", watch=log)
    assert sorted(each.answer for each in read_all(source)) == ["0", "1", "2", "7"]
    assert [each.metadata for each in read_all(source) if each.answer == "0"] == [dapo(0)]
    assert log.lines == [
        "dapo: 7 rows, 4 different; 3 with the prompt and answer of an earlier row are taken out "
        "(data.repeats=keep keeps them)"
    ]
    assert log.shares[-1] == ("reading dapo", 1.0)


def test_repeats_are_found_across_files_and_however_they_are_written(tmp_path):
    first = write_as("jsonl", tmp_path, [{"q": "x", "a": 7}])
    second = write_as("parquet", tmp_path, [{"q": [{"role": "user", "content": "x"}], "a": "7"}])
    third = tmp_path / "third.jsonl"
    third.write_text('{"q": [{"content": "x", "role": "user"}], "a": "#### 7"}\n')
    assert len(FileSource([first, second, str(third)], PLAIN)) == 1


def test_kept_repeats_keep_their_columns_and_are_asked_about_once(tmp_path):
    rows = [dapo(0), dapo(1), dapo(0, extra_info={"index": "another"}), dapo(1)]
    log = LoggedWatch()
    source = FileSource(
        write_as("parquet", tmp_path, rows), CHAT, name="dapo", has_repeats=True, watch=log
    )
    assert len(source) == 4
    indices = [each.metadata["extra_info"]["index"] for each in read_all(source)]
    assert sorted(indices) == ["another", "id-0", "id-1", "id-1"]
    assert "4 rows, 2 different; 2 with the prompt" in log.lines[0]
    assert log.lines[0].endswith("are kept (data.repeats=drop takes them out)")
    asked = []
    source.keep(lambda each, where: asked.append(each) or each.messages[0][1] == "Solve 0")
    assert len(asked) == 2
    assert {each.answer for each in read_all(source)} == {"0"} and len(source) == 2


def test_repeats_are_found_after_the_values_were_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAX_VALUES", 2)
    rows = [dapo(n) for n in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert len(FileSource(write_as("parquet", tmp_path, rows), CHAT)) == 4


def test_texts_that_join_to_the_same_text_are_no_repeats(tmp_path):
    rows = [{"q": "ab", "a": "c"}, {"q": "a", "a": "bc"}, {"q": "abc", "a": "0"}]
    assert len(FileSource(write_as("jsonl", tmp_path, rows), PLAIN)) == 3


def test_the_fingerprint_tells_rows_from_others(tmp_path):
    def fingerprint(rows):
        return FileSource(write_as("jsonl", tmp_path, rows), PLAIN).fingerprint

    rows = [{"q": f"{n}", "a": "1", "tests": n} for n in range(9)]
    same = fingerprint(rows)
    assert same["num_rows"] == 9
    assert fingerprint(rows + rows[:3]) == same  # repeats are no part of the stream
    others = [
        rows[::-1],
        rows[1:],
        [{"q": "new", "a": "1", "tests": 0}, *rows],
        [row | {"a": "2"} for row in rows],
        [row | {"tests": 7} for row in rows],  # what a user's own verifier may read
    ]
    digests = {fingerprint(each)["digest"] for each in others}
    assert len(digests) == 5 and same["digest"] not in digests


BROKEN = [
    ("a lone surrogate in the question", r'{"q":"\ud83d 1+1","a":"2"}', r"surrogate \\ud83d at c"),
    ("one in the answer", r'{"q":"1+1","a":"2\udc00"}', r"column 'a' .*surrogate \\udc00 at char"),
    ("one in a message", r'{"q":[{"role":"user","content":"\udead"}],"a":"2"}', r"surrogate \\ud"),
    ("one in a role", r'{"q":[{"role":"\ud800","content":"1"}],"a":"2"}', r"surrogate \\ud800 at"),
    ("NaN as the answer", '{"q":"1+1","a":NaN}', "a text or a finite number in column 'a'.* nan"),
    ("infinity", '{"q":"1+1","a":-Infinity}', "a finite number in column 'a'.* got -inf"),
    ("a number too large", '{"q":"1+1","a":1e400}', "a finite number in column 'a'.* got inf"),
    ("an empty answer", '{"q":"1+1","a":""}', "an answer in column 'a' .*got an empty text"),
    ("a blank answer", r'{"q":"1+1","a":" \n"}', "an answer in column 'a' .*got an empty text"),
    ("no answer", '{"q":"1+1","a":null}', "a text or a finite number in column 'a' .*got None"),
    ("an empty question", '{"q":" ","a":"1"}', "a question in column 'q' .*got an empty text"),
    ("an empty message", '{"q":[{"role":"user","content":""}],"a":"1"}', "got an empty text"),
    ("no messages", '{"q":[],"a":"1"}', "a list of chat messages in column 'q'"),
    ("NaN as the question", '{"q":NaN,"a":"1"}', "a text or a list of chat messages.* got nan"),
]


@pytest.mark.parametrize(("row", "message"), [each[1:] for each in BROKEN], ids=lambda each: each)
def test_a_broken_row_is_one_line_with_file_and_line(row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q":"1","a":"1"}\r\n\r\n' + row + "\r\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 3: expected .*{message}") as caught:
        FileSource(str(path), PLAIN)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # so that it can be printed


def test_an_answer_that_nothing_reads_may_be_empty(tmp_path):
    own = Layout(prompt_column="q", answer_column="a")
    path = write_as("jsonl", tmp_path, [{"q": "1", "a": ""}])
    assert read_all(FileSource(path, own))[0].answer == ""


def test_a_nan_in_a_column_that_nothing_reads_is_no_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q":"1","a":"1","score":NaN}\n')
    assert read_all(FileSource(str(path), PLAIN))[0].metadata["score"] != 0


def test_a_broken_row_of_parquet_names_file_and_row(tmp_path):
    path = write_as("folder", tmp_path, [{"q": str(n), "a": 1.0} for n in range(5)] * 2)
    table = pa.table({"q": ["x", "y", "z"], "a": [1.0, float("nan"), 2.0]})
    pq.write_table(table, f"{path}/part-1.parquet")
    with pytest.raises(DataError, match=r"part-1\.parquet, row 1: expected a text or a finite"):
        FileSource(path, PLAIN)


@pytest.mark.parametrize("list_of", [pa.list_, pa.large_list, lambda of: pa.list_(of, 1)])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string()])
def test_messages_in_every_type_of_list(list_of, text, tmp_path):
    message = pa.struct([("role", text), ("content", text)])
    chats = [[{"role": "user", "content": str(n)}] for n in range(9)]
    table = pa.table({"q": pa.array(chats, list_of(message)), "a": list(range(9))})
    pq.write_table(table, tmp_path / "chats.parquet", row_group_size=2)
    source = FileSource(str(tmp_path / "chats.parquet"), PLAIN)
    assert [source.row(n).messages for n in range(9)] == [(("user", str(n)),) for n in range(9)]


def test_messages_that_older_data_sets_store_by_column(tmp_path):
    rows = [{"q": {"role": ["system", "user"], "content": ["s", f"{n}"]}, "a": n} for n in (1, 2)]
    source = FileSource(write_as("parquet", tmp_path, rows), PLAIN)
    assert {each.messages for each in read_all(source)} == {
        (("system", "s"), ("user", "1")),
        (("system", "s"), ("user", "2")),
    }


def test_a_system_prompt_replaces_those_of_the_rows_and_says_so(tmp_path):
    layout = Layout(prompt_column="q", answer_column="a", system_prompt="Mine.")
    rows = [
        {"q": [{"role": "system", "content": "Theirs."}, {"role": "user", "content": "1"}], "a": 1},
        {"q": [{"role": "user", "content": "2"}], "a": 2},
    ]
    log = LoggedWatch()
    source = FileSource(write_as("jsonl", tmp_path, rows), layout, name="x", watch=log)
    assert {each.messages for each in read_all(source)} == {
        (("system", "Mine."), ("user", "1")),
        (("system", "Mine."), ("user", "2")),
    }
    assert log.lines == ["x: the system messages of 1 rows are replaced by system_prompt"]


def is_digits(answer):
    if not answer.isdigit():
        raise ValueError(f"expected digits, got {answer!r}")


ANSWERS = [{"q": f"q{n}", "a": "x" if n in (2, 5) else str(n % 4)} for n in range(9)]


def test_an_answer_that_cannot_be_read_is_told_by_line_and_column(tmp_path):
    path = write_as("jsonl", tmp_path, ANSWERS)
    with pytest.raises(
        DataError,
        match=r"data.jsonl, line 3: column 'a' \(data.tasks\[\].answer_column\): expected digits, "
        r"got 'x': choose another data.tasks\[\].verifier, or drop such rows by "
        r"data.unreadable_answers=drop$",
    ):
        FileSource(path, PLAIN, check_answer=is_digits)


def test_rows_whose_answer_cannot_be_read_are_dropped_and_counted(tmp_path):
    path, log = write_as("jsonl", tmp_path, [*ANSWERS, *ANSWERS[6:]]), LoggedWatch()
    source = FileSource(
        path, PLAIN, name="sums", check_answer=is_digits, drops_unreadable=True, watch=log
    )
    assert log.lines == [
        "sums: 2 of 12 rows are dropped, with an answer in column 'a' that the task's verifier "
        "cannot read (data.unreadable_answers=drop)",
        "sums: 12 rows, 7 different; 3 with the prompt and answer of an earlier row are taken out "
        "(data.repeats=keep keeps them)",
    ]
    assert [each.metadata["q"] for _, each in source.sample(100)] == [
        f"q{n}" for n in (0, 1, 3, 4, 6, 7, 8)
    ]


def test_a_sample_is_spread_over_the_rows(tmp_path):
    source = FileSource(write_as("jsonl", tmp_path, ANSWERS), PLAIN, name="sums")
    assert [(where[-6:], each.answer) for where, each in source.sample(3)] == [
        ("line 1", "0"),
        ("line 5", "0"),
        ("line 9", "0"),
    ]
    source.keep(lambda candidate, _: candidate.metadata["q"] != "q0")
    assert [where[-6:] for where, _ in source.sample(2)] == ["line 2", "line 9"]
