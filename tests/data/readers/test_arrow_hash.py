"""Hashes of nested rows: equal exactly where the values are."""

import datetime
import random
from collections import defaultdict
from decimal import Decimal

import pyarrow as pa
import pytest

from megatron_rl.data.readers.arrow_hash import hash_array

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
CHAT = pa.list_(MESSAGE)


def check(array: pa.Array) -> None:
    """Rows have equal hashes exactly if `to_pylist` gives equal values."""
    groups = defaultdict(set)
    for value, code in zip(array.to_pylist(), hash_array(array).tolist(), strict=True):
        groups[repr(value)].add(code)
    assert all(len(codes) == 1 for codes in groups.values())
    assert len(set.union(*groups.values())) == len(groups)


def random_chat(chance: random.Random):
    def text():
        return chance.choice(["", "a", "b", "ab", "\N{GREEK SMALL LETTER PI}", None])

    if chance.random() < 0.1:
        return None
    return [
        None if chance.random() < 0.1 else {"role": text(), "content": text()}
        for _ in range(chance.randrange(4))
    ]


@pytest.mark.parametrize("kind", [CHAT, pa.large_list(MESSAGE)])
def test_random_chats_also_in_slices(kind: pa.DataType) -> None:
    chance = random.Random(0)
    array = pa.array([random_chat(chance) for _ in range(3000)], type=kind)
    check(array)
    for start, length in ((1, 500), (7, 1), (2990, 10)):
        part = array.slice(start, length)
        check(part)
        assert hash_array(part).tolist() == hash_array(array).tolist()[start : start + length]
    assert len(hash_array(array.slice(0, 0))) == 0


def test_order_and_place_of_parts_matter() -> None:
    pairs = [("a", "b"), ("b", "a"), ("ab", ""), ("", "ab"), ("a", None), (None, "a")]
    check(pa.array([{"x": x, "y": y} for x, y in pairs]))
    check(pa.array([["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], [], [""], ["", ""], None]))
    check(pa.array([[["a"], ["b"]], [["a", "b"]], [["a", "b"], []], [[], ["a", "b"]]]))


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 1, None],
        [1.5, float("nan"), 1.5, None],
        [True, False, None],
        [Decimal("1.50"), Decimal("2.00"), Decimal("1.50")],
        [datetime.date(2026, 1, 1), datetime.date(2026, 1, 2), None],
        [b"\xff", b"", None],
        [None, None],
    ],
)
def test_leaves_of_other_types(values: list) -> None:
    check(pa.array(values))


def test_a_column_of_categories_is_its_values() -> None:
    plain = pa.array(["b", "a", None, "b"])
    assert hash_array(plain.dictionary_encode()).tolist() == hash_array(plain).tolist()


def test_equal_values_of_other_batches_have_equal_hashes() -> None:
    one = pa.array([[{"role": "user", "content": f"{n}"}] for n in range(100)], type=CHAT)
    other = pa.array([[{"role": "user", "content": f"{n}"}] for n in range(99, -1, -1)], type=CHAT)
    assert hash_array(one).tolist() == hash_array(other).tolist()[::-1]
