"""Hashes of the values at dotted paths."""

from megatron_rl.data.readers.columns import hash_values

PATHS = ("q", "a.truth")


def test_records_with_equal_values_at_the_paths_have_equal_hashes():
    rows = [
        {"q": "x", "a": {"truth": 7}, "id": 0},
        {"q": "x", "a": {"truth": 7}, "id": 1},
        {"q": "x", "a": {"truth": "7"}, "id": 0},
        {"q": [{"role": "user", "content": "x"}], "a": {"truth": 7}},
        {"q": "x", "id": 0},
        {"q": "x", "id": 1},
        {"q": "\ud83d", "a": {"truth": None}},
    ]
    hashes = hash_values(rows, PATHS)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 6
    assert hash_values(rows[::-1], PATHS) == hashes[::-1]
