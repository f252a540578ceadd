import time

import pytest

from megatron_rl.observe.stopwatch import Stations


def test_seconds_add_up_per_station_until_taken():
    stations = Stations()
    for _ in range(2):
        with stations.time("rollout"):
            time.sleep(0.02)
    with stations.time("sync"):
        pass
    seconds = stations.take()
    assert list(seconds) == ["rollout", "sync"]
    assert 0.04 <= seconds["rollout"] < 1.0 and seconds["sync"] < 0.02
    assert stations.take() == {}


def test_whoever_shows_it_is_told_of_every_entry():
    entered = []
    stations = Stations(on_enter=entered.append)
    with stations.time("learner"), stations.time("sync"):
        assert entered == ["learner", "sync"]
    with stations.time("learner"):
        assert entered == ["learner", "sync", "learner"]


def test_a_station_that_fails_is_timed_and_named():
    stations = Stations()
    with pytest.raises(RuntimeError), stations.time("step"), stations.time("sync"):
        raise RuntimeError("gone")
    assert stations.current == "sync"
    assert set(stations.take()) == {"step", "sync"}
