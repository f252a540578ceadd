"""Hashes of the rows of an Arrow array, computed for each different value of a batch and not for
each row: text is hashed once, its rows by their numbers.

A struct or a list is hashed from the hashes h of its parts: h' = m(... m(m(seed ^ h_0) ^ h_1) ...)
for the fields of a struct, and the sum of m(h_i ^ m(i)) with the length for a list, where m is the
mixer of splitmix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

_NULL = np.uint64(0x6E756C6C)
_SEED = np.uint64(0x73656564)


def hash_array(array: pa.Array) -> np.ndarray:
    """[n] uint64, equal for rows with equal values.

    Raises:
        pyarrow.ArrowNotImplementedError: pyarrow cannot compare values of this type.
    """
    kind = array.type
    if pa.types.is_struct(kind):
        hashes = np.full(len(array), _SEED)
        for number in range(kind.num_fields):
            hashes = _mix(hashes ^ hash_array(array.field(number)))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        hashes = _hash_lists(array)
    else:
        return _hash_leaves(array)
    if array.null_count:
        hashes[array.is_null().to_numpy(zero_copy_only=False)] = _NULL
    return hashes


def _hash_lists(array: Any) -> np.ndarray:
    offsets = array.offsets.to_numpy().astype(np.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    starts, lengths = offsets - first, np.diff(offsets)
    places = np.arange(last - first) - np.repeat(starts[:-1], lengths)
    items = hash_array(array.values.slice(first, last - first))
    mixed = _mix(items ^ _mix(places.astype(np.uint64)))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return _mix(sums[starts[1:]] - sums[starts[:-1]] + _mix(lengths.astype(np.uint64)))


def _hash_leaves(array: Any) -> np.ndarray:
    if pa.types.is_null(array.type):
        return np.full(len(array), _NULL)
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    values = [_hash_value(value) for value in encoded.dictionary.to_pylist()]
    table = np.array([*values, _NULL], dtype=np.uint64)
    places = encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)
    return table[places]


def _hash_value(value: Any) -> int:
    text = value if isinstance(value, str) else repr(value)
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def _mix(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
