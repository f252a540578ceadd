"""Shows the progress of reading the data, before the first step, and of an evaluation: a bar on a
terminal, and elsewhere a line from time to time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from megatron_rl.process.lifetime import register_cleanup, unregister_cleanup

BAR_SECONDS = 0.5  # after which a bar is shown; shorter readings show none
LINE_SECONDS = 10.0  # between two lines, if the output is no terminal


class LoadingConsole:
    """A context manager that restores the terminal when it exits, and also when a signal ends the
    process (`lifetime.watch_signals`).

    Args:
        is_shown: False on all ranks but the first.
        console: the console to print on; standard output by default.
        line_seconds: between two lines, if the output is no terminal.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        is_shown: bool,
        console: Console | None = None,
        line_seconds: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_shown = is_shown
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._line_seconds = line_seconds
        self._clock = clock
        self._start = clock()
        self._num_lines = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("data", total=1.0)

    def __enter__(self) -> LoadingConsole:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar.live.is_started:
            unregister_cleanup(self._bar.stop)
            self._bar.stop()

    def start_clock(self) -> None:
        """Count the seconds from now on, for work that begins after a wait."""
        self._start, self._num_lines = self._clock(), 0

    def progress(self, what: str, share: float) -> None:
        """Show that `what`, for instance "reading gsm8k", is done to `share`, 0 to 1."""
        if not self._is_shown:
            return
        seconds = self._clock() - self._start
        if not self._console.is_terminal:
            if seconds >= self._line_seconds * (self._num_lines + 1):
                self._num_lines = int(seconds / self._line_seconds)
                self.say(f"{what}: {share:.0%} after {seconds:.0f} s")
            return
        if seconds >= BAR_SECONDS and not self._bar.live.is_started:
            register_cleanup(self._bar.stop)  # otherwise the cursor would stay hidden
            self._bar.start()
        self._bar.update(self._task, description=what, completed=share)

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._is_shown:
            self._console.print(Text(line))
