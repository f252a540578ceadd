"""Finds the data files that a setting names: a file, a pattern, a folder, or a list of these.

A folder is one that Hugging Face's `save_to_disk` wrote, or one that directly holds data files of a
single kind. The order of the files is that of a list, and of their names in a folder or a pattern.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.hub import cached_folder, how_to_fetch
from megatron_rl.errors import DataError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
_EXPECTED = f"a file ending in {', '.join(KINDS)}"
_SPLIT = re.compile(r"(train|test|valid|validation|val|dev)(?![a-z])", re.IGNORECASE)


def data_files(path: str | Sequence[str], key: str) -> list[Path]:
    """The files that a setting names, in the order in which their rows are read.

    Args:
        path: a file, a pattern, a folder, or a list of these.
        key: the setting, for messages.

    Raises:
        DataError: there is no such file, its kind is unknown, a folder holds files of several kinds
            or splits, or a file is named twice.
    """
    files: list[Path] = []
    for each in [path] if isinstance(path, str) else path:
        files += _files_of(each, key)
    resolved: set[Path] = set()
    for file in files:
        if (real := file.resolve()) in resolved:
            raise DataError(f"{key}: expected each file once, got {file} twice")
        resolved.add(real)
    if not files:
        raise DataError(f"{key}: expected a file, got an empty list")
    return files


def _files_of(path: str, key: str) -> list[Path]:
    place = Path(path)
    if not path:
        raise DataError(f"{key}: expected a file, got an empty text")
    if place.is_file():
        return [_known(place, key)]
    if place.is_dir():
        return _in_folder(place, key)
    found = [Path(each) for each in sorted(glob.glob(path))]
    if files := [each for each in found if each.is_file()]:
        return [_known(each, key) for each in files]
    if found:
        kind = "a broken link" if not found[0].exists() else "no file"
        raise DataError(f"{path}: expected a file ({key}), got {found[0]}, which is {kind}")
    if cached := cached_folder(path, kind="dataset"):
        return _in_folder(Path(cached), key)
    fetch = how_to_fetch(path, kind="dataset")
    raise DataError(f"{path}: expected a file ({key}), found none{fetch}")


def _known(file: Path, key: str) -> Path:
    if file.suffix not in KINDS:
        raise DataError(f"{file}: expected {_EXPECTED} ({key}), got {file.suffix or 'no ending'}")
    return file


def _in_folder(folder: Path, key: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in folder.iterdir() if each.is_dir())
        raise DataError(
            f"{folder}: expected one split of the data set ({key}), such as "
            f"{folder / (splits or ['train'])[0]}, got the folder of {', '.join(splits)}"
        )
    if (folder / "state.json").is_file():
        return _saved_to_disk(folder)
    names = sorted(each for each in folder.iterdir() if not each.name.startswith((".", "_")))
    files = [each for each in names if each.suffix in KINDS and each.is_file()]
    if not files:
        there = ", ".join(each.name for each in names[:6]) or "nothing"
        raise DataError(f"{folder}: expected {_EXPECTED} in this folder ({key}), got {there}")
    kinds = sorted({each.suffix for each in files})
    splits = sorted({match[1] for each in files if (match := _SPLIT.match(each.name))})
    for what, several in (("kind", kinds), ("split", splits)):
        if len(several) > 1:
            pattern = f"{several[0]}*" if what == "split" else f"*{several[0]}"
            raise DataError(
                f"{folder}: expected files of one {what} ({key}), got {', '.join(several)}: name "
                f"those to read by a pattern, such as {folder / pattern}"
            )
    return files


def _saved_to_disk(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `datasets` wrote, in the order of its rows."""
    state = folder / "state.json"
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        names = [str(each["filename"]) for each in content["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: expected a list _data_files, got {error!r}") from None
    if content.get("_indices_data_files") or content.get("_indices_files"):
        raise DataError(
            f"{folder}: expected a data set without an indices mapping, got one with: save it "
            "again after flatten_indices()"
        )
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(f"{state}: expected files in the same folder, got {name!r}")
    if not names:
        raise DataError(f"{state}: expected at least one data file, got none")
    return [folder / name for name in names]
