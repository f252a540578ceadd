"""Seconds in which nothing was going on, on a clock that the test moves."""

from __future__ import annotations

from megatron_rl.rollout.idle import IdleClock


def test_overlapping_activities_count_once() -> None:
    now = 0.0
    idle = IdleClock(lambda: now)
    now = 2.0  # idle for 2
    with idle.busy():
        now = 3.0
        with idle.busy():
            now = 5.0
        now = 6.0
        assert idle.take() == (2.0, 6.0)
        now = 7.0
    now = 10.0  # idle for 3
    assert idle.take() == (3.0, 4.0)
    assert idle.take() == (0.0, 0.0)
