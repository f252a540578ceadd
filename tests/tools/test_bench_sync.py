"""A small sync and a small broadcast, between two processes."""

from tools.bench_sync import measure


def test_both_are_timed_in_turn() -> None:
    [(sync, plain)] = measure(8, 1, bucket_mib=4.0)
    assert 0 < plain < 10 and 0 < sync < 10
