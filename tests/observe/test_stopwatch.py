import time

import pytest

from megatron_rl.observe.stopwatch import Stopwatch


def test_seconds_add_up_per_phase_until_taken():
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch.time("rollout"):
            time.sleep(0.02)
    with stopwatch.time("sync"):
        pass
    seconds = stopwatch.take()
    assert list(seconds) == ["rollout", "sync"]
    assert 0.04 <= seconds["rollout"] < 1.0 and seconds["sync"] < 0.02
    assert stopwatch.take() == {}


def test_on_enter_is_called_at_every_entry():
    entered = []
    stopwatch = Stopwatch(on_enter=entered.append)
    with stopwatch.time("learner"), stopwatch.time("sync"):
        assert entered == ["learner", "sync"]
    with stopwatch.time("learner"):
        assert entered == ["learner", "sync", "learner"]


def test_a_phase_that_fails_is_timed_and_named():
    stopwatch = Stopwatch()
    with pytest.raises(RuntimeError), stopwatch.time("step"), stopwatch.time("sync"):
        raise RuntimeError("gone")
    assert stopwatch.current == "sync"
    assert set(stopwatch.take()) == {"step", "sync"}
