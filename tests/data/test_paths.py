"""The files that a setting names: files, patterns, folders, lists."""

import json

import pytest

from megatron_rl.data.paths import data_files
from megatron_rl.errors import DataError

KEY = "data.tasks[].path"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes empty files, or files with content, below the current folder."""
    monkeypatch.chdir(tmp_path)

    def make(*names, **contents):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(contents.get("content", ""))

    return make


def names(path):
    return [str(each) for each in data_files(path, KEY)]


def test_a_file_of_every_kind(make):
    for suffix in ("jsonl", "ndjson", "json", "parquet", "csv", "tsv", "arrow"):
        make(f"a.{suffix}")
        assert names(f"a.{suffix}") == [f"a.{suffix}"]


def test_a_folder_in_the_order_of_its_names(make):
    make("d/b.jsonl", "d/a.jsonl", "d/README.md", "d/.hidden.jsonl", "d/_SUCCESS", "d/sub/c.jsonl")
    assert names("d") == ["d/a.jsonl", "d/b.jsonl"]


def test_a_pattern_and_a_list(make):
    make("d/train-1.parquet", "d/train-0.parquet", "d/test-0.parquet", "e.csv")
    assert names("d/train-*.parquet") == ["d/train-0.parquet", "d/train-1.parquet"]
    assert names(["e.csv", "d/train-*.parquet"])[0] == "e.csv"


def test_a_name_with_a_bracket_is_a_file_first(make):
    make("a[1].jsonl")
    assert names("a[1].jsonl") == ["a[1].jsonl"]


def test_a_data_set_on_disk(make):
    state = {"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]}
    make("d/data-0.arrow", "d/data-1.arrow", "d/cache-7.arrow", "d/dataset_info.json")
    make("d/state.json", content=json.dumps(state))
    assert names("d") == ["d/data-1.arrow", "d/data-0.arrow"]
    make("d/state.json", content=json.dumps(state | {"_indices_data_files": [{"filename": "i"}]}))
    with pytest.raises(DataError, match=r"d: .* indices mapping.* flatten_indices\(\)"):
        names("d")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{}", "expected a list _data_files"),
        ("nothing", "expected a list _data_files"),
        ('{"_data_files": []}', "at least one data file, got none"),
        ('{"_data_files": [{"filename": "data-9.arrow"}]}', "same folder, got 'data-9.arrow'"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', r"same folder, got '\.\./x\.arrow'"),
    ],
)
def test_a_broken_data_set_on_disk(state, message, make):
    make("d/data-0.arrow", "x.arrow")
    make("d/state.json", content=state)
    with pytest.raises(DataError, match=rf"d/state\.json: .*{message}"):
        names("d")


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ([], "none.jsonl", r"none\.jsonl: expected a file \(data\.tasks\[\]\.path\), found none"),
        ([], "none-*.jsonl", r"none-\*\.jsonl: expected a file"),
        ([], [], r"path: expected a file, got an empty list"),
        (["a.txt"], "a.txt", r"a\.txt: expected a file ending in \.jsonl, .*\.parquet"),
        (["a.txt"], "a.txt", r"\.arrow \(data\.tasks\[\]\.path\), got \.txt$"),
        (["README"], "READ*", r"README: expected a file ending in .*, got no ending$"),
        ([], [""], r"data\.tasks\[\]\.path: expected a file, got an empty text"),
        (["a.jsonl.gz"], "a.jsonl.gz", r"a\.jsonl\.gz: expected a file ending in"),
        (["a.jsonl"], ["a.jsonl", "./a.jsonl"], r"expected each file once, got a\.jsonl twice"),
        (["d/a.txt"], "d", r"d: expected a file ending in .* in this folder .*, got a\.txt"),
        (["d/a.csv", "d/b.json"], "d", r"one kind .*got \.csv, \.json: .* such as d/\*\.csv"),
        (
            ["d/train-0.csv", "d/test-0.csv"],
            "d",
            r"one split .*got test, train: .* such as d/test\*",
        ),
        (
            ["d/dataset_dict.json", "d/train/state.json", "d/test/state.json"],
            "d",
            r"one split of the data set .* such as d/test, got the folder of test, train",
        ),
    ],
)
def test_what_is_no_data(files, path, message, make):
    make(*files)
    with pytest.raises(DataError, match=message) as caught:
        names(path)
    assert "\n" not in str(caught.value)


def test_words_that_begin_like_a_split_are_none(make):
    make("d/training.csv", "d/testament.csv", "d/devious.csv")
    assert len(names("d")) == 3


@pytest.mark.parametrize("path", ["gone.jsonl", "*.jsonl"])
def test_a_broken_link_is_named(path, make, tmp_path):
    (tmp_path / "gone.jsonl").symlink_to("moved/away.jsonl")
    with pytest.raises(DataError, match=r"expected a file .*got gone\.jsonl, which is a broken"):
        names(path)


def test_a_pattern_of_folders_finds_no_file(make):
    make("d/a.jsonl", "e/a.jsonl")
    with pytest.raises(DataError, match=r"\[de\]: expected a file .*got d, which is no file"):
        names("[de]")
