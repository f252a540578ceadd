"""Who serves and who is at fault, without engines."""

from __future__ import annotations

import pytest

from megatron_rl.engine.roster import Roster
from megatron_rl.errors import EnginesLostError


def test_enough_engines_serve_until_too_few_do() -> None:
    roster = Roster(["a", "b", "c"], min_engines=2)
    roster.leave_out("b", "b froze")
    roster.leave_out("b", "another reason")
    assert (roster.serving, roster.lost, roster.shortage()) == (("a", "c"), {"b": "b froze"}, "")
    roster.check_enough()
    roster.leave_out("a", "a died")
    with pytest.raises(EnginesLostError) as error:
        roster.check_enough()
    assert str(error.value) == (
        "engines: expected at least rollout.min_engines=2 that serve, got 1 of 3: b froze; a died"
    )
    roster.take_in("b")
    assert (roster.serving, roster.shortage()) == (("b", "c"), "")


def test_of_a_single_engine_its_own_end_is_told() -> None:
    roster = Roster(["a"])
    roster.leave_out("a", "engine 0: exited with code 7\nits log")
    assert roster.shortage() == "engine 0: exited with code 7\nits log"


def test_the_second_engine_that_fails_at_a_request_clears_the_first() -> None:
    roster = Roster(["a", "b"])
    assert roster.blame((7, 0), "a", "a said NaN", is_invalid=True) == ""
    assert roster.serving == ("b",) and roster.has_answered_invalidly("a")
    assert roster.blame((8, 0), "b", "b is silent") == ""  # of another request
    assert not roster.has_answered_invalidly("b")
    both = roster.blame((7, 0), "b", "b said NaN", is_invalid=True)
    assert both == "b said NaN; before that: a said NaN"


def test_an_engine_that_was_started_again_counts_as_another_one() -> None:
    roster = Roster(["a"])
    assert roster.blame((7, 0), "a", "NaN") == ""
    assert roster.blame((7, 0), "a", "NaN") == ""  # a second request of the same process
    roster.take_in("a")
    assert roster.blame((7, 0), "a", "NaN again") == "NaN again; before that: NaN"


def test_what_each_engine_answered_last() -> None:
    now = 100.0
    roster = Roster(["a", "b"], clock=lambda: now)
    roster.note_answer("a", "prompt 12")
    now = 107.2
    roster.leave_out("b", "b died")
    assert roster.last_answers() == (
        "a answered prompt 12 7 s ago; b has answered nothing yet, is left out"
    )
    assert (roster.has_answered("a"), roster.has_answered("b")) == (True, False)
    roster.leave_out("a", "a died")
    roster.take_in("a")  # another process
    assert not roster.has_answered("a")


def test_an_engine_that_serves_and_answers_nothing_is_silent() -> None:
    now = 100.0
    roster = Roster(["a", "b"], clock=lambda: now)
    roster.note_answer("a", "prompt 12")
    assert roster.is_any_silent(60.0)  # b
    roster.leave_out("b", "b died")
    assert not roster.is_any_silent(60.0)
    now = 160.0
    assert roster.is_any_silent(60.0)
    roster.note_answer("a", "prompt 13")
    assert not roster.is_any_silent(60.0)
