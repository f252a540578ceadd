"""How the ranks of a run agree on its engines, with engines that are started again by a word."""

from __future__ import annotations

import pytest

from megatron_rl.config import RolloutConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.roster import Roster
from megatron_rl.errors import EngineError
from megatron_rl.loop import crew as crew_module
from megatron_rl.loop.crew import Crew
from tests.fakes.learner import FakeParallel

A, B = "http://a", "http://b"


class FakeEngines:
    """Starts each of `own` again `num_left` times; it is ready after `looks` looks."""

    def __init__(self, *own: str, num_left: int = 1, looks: int = 1) -> None:
        self.own, self.dead = set(own), {}
        self._left = dict.fromkeys(own, num_left)
        self._looks = looks
        self._starting: dict[str, int] = {}
        self.log: list[str] = []

    def ended(self) -> dict[str, str]:
        return dict(self.dead)

    @property
    def restartable(self) -> set[str]:
        return {url for url, left in self._left.items() if left}

    @property
    def restarting(self) -> set[str]:
        return set(self._starting)

    def restart(self, url: str) -> None:
        self.log.append(f"start {url}")
        self._left[url] -= 1
        self._starting[url] = self._looks
        self.dead.pop(url, None)

    def halt(self, url: str) -> None:
        self.log.append(f"end {url}")

    def restarted(self) -> set[str]:
        self._starting = {url: left - 1 for url, left in self._starting.items()}
        ready = {url for url, left in self._starting.items() if left <= 0}
        self._starting = {url: left for url, left in self._starting.items() if left > 0}
        return ready


class Bench:
    """A crew of A and B on rank 0."""

    def __init__(self, engines: FakeEngines, *, min_engines: int = 1) -> None:
        self.lines: list[str] = []
        self.engines, self.roster = engines, Roster([A, B], min_engines)
        self.parallel = FakeParallel()
        config = RolloutConfig(num_engines=2, min_engines=min_engines)
        addresses = [EngineAddress(url=url, token="t") for url in (A, B)]
        self.crew = Crew(engines, addresses, self.roster, self.parallel, config, self.lines.append)


@pytest.fixture(autouse=True)
def nothing_answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Which URL answers a look; no waiting."""
    answers: dict[str, bool] = {}
    monkeypatch.setattr(crew_module, "is_back", lambda address, _: answers.get(address.url, False))
    monkeypatch.setattr(crew_module, "is_alive", lambda address, _: answers.get(address.url, False))
    monkeypatch.setattr(crew_module, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(crew_module, "DEATH_SECONDS", 0.0)
    return answers


def test_a_lost_engine_is_started_again_and_taken_in_with_a_publication() -> None:
    bench = Bench(FakeEngines(A, B, looks=2))
    crew = bench.crew
    assert crew.gather() == ((A, B), False)
    bench.engines.dead[B] = "engine 1 (http://b): ended by SIGKILL\n  its log"
    assert crew.agree() == ""
    assert bench.engines.log == [f"start {B}"]
    assert bench.lines == [
        "engine 1 (http://b): ended by SIGKILL; it is started again, 1 of 2 serve",
        "  its log",
    ]
    crew.agree()  # once is enough
    assert len(bench.lines) == 2 and crew.serving == (A,)
    assert crew.gather() == ((A,), True)  # it is not ready yet, and nobody waits for it
    crew.take_in((A,))
    assert crew.gather() == ((A, B), True)
    assert crew.serving == (A,)  # until it has the weights
    crew.take_in((A, B))
    assert crew.serving == (A, B)
    assert bench.lines[-1] == "engine http://b: serves again, with the present weights"
    assert crew.gather() == ((A, B), False)


def test_with_too_few_engines_the_publication_waits_for_those_that_start() -> None:
    bench = Bench(FakeEngines(A, B, looks=3), min_engines=2)
    bench.roster.leave_out(A, "a froze")
    told = bench.crew.agree(bench.roster.shortage())
    assert told.startswith("engines: expected at least rollout.min_engines=2 that serve, got 1")
    assert bench.crew.gather() == ((A, B), True)


def test_engines_that_nobody_starts_end_the_run_with_what_became_of_them() -> None:
    bench = Bench(FakeEngines(A, num_left=0), min_engines=2)
    bench.roster.leave_out(A, "engine 0: exited with code 7")
    with pytest.raises(EngineError, match=r"min_engines=2 .*engine 0: exited with code 7"):
        bench.crew.gather()
    assert bench.lines == ["engine 0: exited with code 7; nobody starts it again, 1 of 2 serve"]
    assert bench.engines.log == [f"end {A}"]  # a frozen one would keep its memory


def test_an_engine_that_somebody_else_started_again_comes_back(
    nothing_answers: dict[str, bool],
) -> None:
    bench = Bench(FakeEngines())
    bench.roster.leave_out(B, "b froze")
    assert bench.crew.gather() == ((A,), True)
    nothing_answers[B] = True
    assert bench.crew.gather() == ((A, B), True)
    # But not one that answered garbage, which it would do again.
    other = Bench(FakeEngines())
    other.roster.blame("a request", B, "b said NaN", is_invalid=True)
    assert other.crew.gather() == ((A,), True)


def test_what_another_rank_found_is_known_to_all() -> None:
    bench = Bench(FakeEngines(B))
    bench.parallel.other_values = [({B: "b froze"}, set(), "b froze, and no other is left", {})]
    assert bench.crew.agree() == "b froze, and no other is left"
    assert bench.engines.log == [f"start {B}"]  # by the rank that started it
    assert bench.roster.lost == {B: "b froze"}


def test_after_a_failed_publication_those_that_do_not_answer_are_left_out(
    nothing_answers: dict[str, bool],
) -> None:
    nothing_answers.update({A: True, B: True})
    bench = Bench(FakeEngines(A, B))
    assert not bench.crew.examine((A, B))
    nothing_answers[B] = False
    assert bench.crew.examine((A, B))
    assert bench.crew.serving == (A,)
    assert bench.engines.log == [f"start {B}"]
    # One that was lost before says nothing about this failure.
    assert not bench.crew.examine((A,))


@pytest.mark.parametrize("looks_dead", [True, False])
def test_one_that_is_lost_again_before_it_is_taken_in_is_started_again(
    nothing_answers: dict[str, bool], looks_dead: bool
) -> None:
    nothing_answers[A] = True
    bench = Bench(FakeEngines(A, B, num_left=2))
    bench.roster.leave_out(B, "b froze")
    assert bench.crew.gather() == ((A, B), True)
    if looks_dead:
        bench.engines.dead[B] = "b died"
    assert bench.crew.examine((A, B))  # after its first publication, which failed
    assert bench.engines.log == [f"start {B}"] * 2
    what = "b died" if looks_dead else "engine http://b: expected an answer to health checks"
    assert bench.lines[-1].startswith(what) and bench.lines[-1].endswith("1 of 2 serve")
    assert bench.crew.gather() == ((A, B), True)
    bench.crew.take_in((A, B))
    assert bench.crew.serving == (A, B)


class Sleepers:
    """What rank 0 calls; `failing` do not answer."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.called: list[tuple[str, ...]] = []

    def __call__(self, urls: tuple[str, ...]) -> dict[str, str]:
        self.called.append(urls)
        return {url: f"engine {url}: no answer" for url in self.failing if url in urls}


def test_an_engine_that_does_not_fall_asleep_is_ended_until_the_others_wake_up() -> None:
    """Its memory is the learner's meanwhile."""
    bench, sleep, wake = Bench(FakeEngines(A, B)), Sleepers(B), Sleepers()
    bench.crew.fall_asleep(sleep)
    assert bench.engines.log == [f"end {B}"]
    assert bench.lines == [f"engine {B}: no answer; it is started again, 1 of 2 serve"]
    bench.crew.wake_up(wake)
    assert bench.engines.log == [f"end {B}", f"start {B}"]
    assert (sleep.called, wake.called) == ([(A, B)], [(A,)])
    assert bench.crew.gather() == ((A, B), True)


def test_one_that_dies_asleep_is_told_by_its_end_and_started_again() -> None:
    bench = Bench(FakeEngines(A, B))
    bench.crew.fall_asleep(Sleepers())
    bench.engines.dead[B] = "engine 1: ended by SIGKILL"
    bench.crew.wake_up(Sleepers(B))
    assert bench.engines.log == [f"start {B}"]
    assert bench.lines == ["engine 1: ended by SIGKILL; it is started again, 1 of 2 serve"]


def test_one_that_loads_is_waited_for_and_falls_asleep_too() -> None:
    """Lost in the rollouts. It would take the learner's memory."""
    bench, sleep, wake = Bench(FakeEngines(A, B, num_left=2, looks=3)), Sleepers(), Sleepers()
    bench.roster.leave_out(B, "b froze")
    bench.crew.agree()
    bench.crew.fall_asleep(sleep)
    bench.crew.wake_up(wake)
    assert (sleep.called, wake.called) == ([(A, B)], [(A, B)])
    assert bench.crew.serving == (A,)  # until it has the weights
    assert bench.crew.gather() == ((A, B), True)
    # And if it does not wake up, it is started once more.
    bench.crew.fall_asleep(Sleepers())
    bench.crew.wake_up(Sleepers(B))
    assert bench.engines.log == [f"start {B}"] * 2
    assert bench.lines[-1] == f"engine {B}: no answer; it is started again, 1 of 2 serve"


def test_without_any_engine_the_publication_waits() -> None:
    bench = Bench(FakeEngines(A, B, looks=2))
    bench.crew.fall_asleep(Sleepers(A, B))
    bench.crew.wake_up(Sleepers())
    assert bench.crew.gather() == ((A, B), True)
    # Not if nobody starts one.
    other = Bench(FakeEngines(A, B, num_left=0))
    other.crew.fall_asleep(Sleepers(A, B))
    other.crew.wake_up(Sleepers())
    with pytest.raises(EngineError, match="got 0 of 2: engine http://a: no answer"):
        other.crew.gather()
