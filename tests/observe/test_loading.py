"""What the reading of the data shows, on a terminal and in a log."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_rl.observe.loading import LoadingConsole
from megatron_rl.process import lifetime


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def make(*, is_terminal: bool, is_shown: bool = True) -> tuple[LoadingConsole, Clock, io.StringIO]:
    text, clock = io.StringIO(), Clock()
    console = Console(file=text, force_terminal=is_terminal, width=80, soft_wrap=True)
    return LoadingConsole(is_shown=is_shown, console=console, clock=clock), clock, text


def test_a_log_gets_a_line_from_time_to_time() -> None:
    loading, clock, text = make(is_terminal=False)
    with loading:
        for clock.seconds in (0, 9, 10, 11, 19, 20, 55, 56):
            loading.progress("reading dapo", clock.seconds / 100)
        loading.say("dapo: 7 rows")
    assert text.getvalue().splitlines() == [
        "reading dapo: 10% after 10 s",
        "reading dapo: 20% after 20 s",
        "reading dapo: 55% after 55 s",
        "dapo: 7 rows",
    ]


def test_a_wait_before_the_work_is_not_counted() -> None:
    loading, clock, text = make(is_terminal=False)
    with loading:
        clock.seconds = 25.0
        loading.progress("reading dapo", 1.0)
        clock.seconds = 120.0
        loading.start_clock()
        for clock.seconds in (121, 130, 131):
            loading.progress("questions", (clock.seconds - 120) / 20)
    assert text.getvalue().splitlines() == [
        "reading dapo: 100% after 25 s",
        "questions: 50% after 10 s",
    ]


def test_a_terminal_gets_a_bar_if_it_takes_a_while() -> None:
    loading, clock, text = make(is_terminal=True)
    with loading:
        loading.progress("reading dapo", 0.5)
        assert text.getvalue() == ""
        clock.seconds = 1.0
        loading.progress("reading dapo", 0.9)
        assert loading._bar.stop in lifetime._cleanups
        loading.say("dapo: 7 rows")
    assert "reading dapo" in text.getvalue() and "90%" in text.getvalue()
    assert "dapo: 7 rows" in text.getvalue()
    assert loading._bar.stop not in lifetime._cleanups
    assert text.getvalue().count("\x1b[?25l") == text.getvalue().count("\x1b[?25h") == 1  # cursor


def test_other_ranks_show_nothing() -> None:
    for is_terminal in (True, False):
        loading, clock, text = make(is_terminal=is_terminal, is_shown=False)
        with loading:
            clock.seconds = 100.0
            loading.progress("reading dapo", 0.5)
            loading.say("dapo: 7 rows")
        assert text.getvalue() == ""
