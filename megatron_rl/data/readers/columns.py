"""Values at dotted paths into a record, and hashes of them by which repeats are found."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import xxhash


def find_value(value: Any, path: str) -> Any:
    """The value at a dotted path, of names in dicts and numbers in lists; a name may hold dots.

    Raises:
        KeyError: there is no value.
    """
    if isinstance(value, dict) and path in value:
        return value[path]
    head, dot, rest = path.partition(".")
    if isinstance(value, list) and head.isdigit() and int(head) < len(value):
        return find_value(value[int(head)], rest) if dot else value[int(head)]
    if isinstance(value, dict) and dot and head in value:
        return find_value(value[head], rest)
    raise KeyError(path)


def hash_values(records: Sequence[dict[str, Any]], paths: Sequence[str]) -> list[int]:
    """A hash of 64 bits of the values at the paths, for each record; a record without one of them
    has a hash of its own content.
    """
    return [_hash(record, paths) for record in records]


def _hash(record: dict[str, Any], paths: Sequence[str]) -> int:
    try:
        values: Any = [find_value(record, path) for path in paths]
    except KeyError:
        values = record
    return xxhash.xxh3_64_intdigest(pickle.dumps(values, pickle.HIGHEST_PROTOCOL))
