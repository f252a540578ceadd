"""The console output of a run: a progress bar, one line per step, and a table at the end.

On a terminal the bar stays below the lines. Elsewhere (a log file, SLURM) only the lines appear.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from megatron_rl.observe.evaluations import AT_K, evaluation_label, evaluation_lines
from megatron_rl.process.lifetime import register_cleanup, unregister_cleanup

SECONDS = "speed/seconds/"  # prefix of a phase's name in a metric key


class StepConsole:
    """Shows each step when it ends.

    A context manager, which restores the terminal when it exits, and also when a signal ends the
    process (`lifetime.watch_signals`).

    Args:
        num_steps: of the whole run.
        num_done: steps that a resumed run has already done.
        console: the console to print on; standard output by default.
    """

    def __init__(self, *, num_steps: int, num_done: int = 0, console: Console | None = None):
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._width = len(str(num_steps))
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=num_steps, completed=num_done)

    def __enter__(self) -> StepConsole:
        self._progress.start()
        if self.console.is_terminal:
            register_cleanup(self._progress.stop)  # otherwise the cursor would stay hidden
        return self

    def __exit__(self, *_exception: object) -> None:
        unregister_cleanup(self._progress.stop)
        self._progress.stop()

    def show_phase(self, phase: str) -> None:
        """Show the name of the current phase beside the bar."""
        self._progress.update(self._task, description=phase)

    def show_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a step, and one for each named evaluation set; metrics that are missing
        are left out.
        """
        self.console.print(step_line(step, metrics, width=self._width))
        for line in evaluation_lines(metrics):
            self.console.print(line)
        self._progress.update(self._task, completed=step)

    def say(self, message: str) -> None:
        """Print a message as a line above the bar."""
        self.console.print(Text(message))


def step_line(step: int, metrics: Mapping[str, float], *, width: int = 4) -> Text:
    """The line of a step, for example:

    `step   12  reward 0.412  discrepancy 0.0041 > 0.0037  lambda 0.1040  grad 0.7  tok/s 5,310`,
    followed by the seconds of each phase and the results of an evaluation.
    """
    line = Text.assemble(("step ", "dim"), (f"{step:>{width}}", "bold"))
    if "reward/mean" in metrics:
        line.append("  reward ", "dim").append(f"{metrics['reward/mean']:.3f}", "bold green")
    for key, label, tolerance_key in (
        ("discrepancy/mean", "discrepancy", "constraint/tolerance"),
        ("constraint/signal/mean", "signal", "constraint/signal/tolerance"),
    ):
        if key in metrics:
            gap, tolerance = metrics[key], metrics.get(tolerance_key)
            is_over = tolerance is not None and gap > tolerance
            line.append(f"  {label} ", "dim").append(f"{gap:.4f}", "yellow" if is_over else "cyan")
            if tolerance is not None:
                line.append(f" {'>' if is_over else '<='} {tolerance:.4f}", "dim")
    for key, label, form in (
        ("constraint/lambda", "lambda", ".4f"),
        ("loss/mean", "loss", ".3g"),
        ("learner/grad_norm", "grad", ".3g"),
        ("speed/tokens_per_second", "tok/s", ",.0f"),
    ):
        if key in metrics:
            line.append(f"  {label} ", "dim").append(f"{metrics[key]:{form}}")
    seconds = {k.removeprefix(SECONDS): v for k, v in metrics.items() if k.startswith(SECONDS)}
    if seconds:
        parts = "  ".join(f"{phase} {value:.1f}s" for phase, value in seconds.items())
        line.append(f"  | {parts}", "dim")
    for key, value in metrics.items():
        if key.startswith("eval/avg_at_"):
            name = key.removeprefix("eval/avg_at_")
            line.append(f"  avg@{name} ", "dim").append(f"{value:.3f}", "bold magenta")
    return line


def summary_table(records: Sequence[Mapping[str, float | None]], *, title: str) -> Table:
    """First and last value of the main metrics of a run, from the lines of its metrics.jsonl.

    Rewards, discrepancies and speeds are means over the first and the last tenth of the steps (at
    least one step), because a single step is noisy; evaluations, tolerance and lambda are single
    values. Seconds are those of the phases that most steps have. The start, step 0, is no part of
    them: its sync waits until the engines have loaded.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("first", "last", "change"):
        table.add_column(heading, justify="right")
    keys = list(dict.fromkeys(key for record in records for key in record))
    evaluations = [key for key in keys if key.startswith("eval/")]
    for key in evaluations:
        _add_row(table, key, records, share=0.0, form=".3f")
    for key, share, form in (
        ("reward/mean", 0.1, ".3f"),
        ("discrepancy/mean", 0.1, ".5f"),
        ("discrepancy/max", 0.1, ".3f"),
        ("constraint/tolerance", 0.0, ".5f"),
        ("constraint/signal/mean", 0.1, ".5f"),
        ("constraint/signal/tolerance", 0.0, ".5f"),
        ("constraint/lambda", 0.0, ".5f"),
        ("speed/tokens_per_second", 0.1, ",.0f"),
    ):
        _add_row(table, key, records, share=share, form=form)
    steps = [record for record in records if record["step"] != 0]
    for key in keys:
        num_steps = sum(record.get(key) is not None for record in steps)
        if key.startswith(SECONDS) and 2 * num_steps > len(steps):
            _add_row(table, key, steps, share=0.1, form=".2f")
    return table


def _add_row(
    table: Table,
    key: str,
    records: Sequence[Mapping[str, float | None]],
    *,
    share: float,
    form: str,
) -> None:
    values = [record[key] for record in records if record.get(key) is not None]
    if not values:
        return
    num_averaged = max(1, int(share * len(values)))
    first = sum(values[:num_averaged]) / num_averaged
    last = sum(values[-num_averaged:]) / num_averaged
    table.add_row(_label(key), f"{first:{form}}", f"{last:{form}}", f"{last - first:+{form}}")


def _label(key: str) -> str:
    if key.startswith(SECONDS):
        return f"seconds, {key.removeprefix(SECONDS)}"
    if AT_K.fullmatch(key):
        return evaluation_label(key)
    if key.startswith("constraint/signal/"):
        return f"constrained {key.removeprefix('constraint/').replace('/', ' ')}"
    return key.removeprefix("constraint/").replace("/", " ").replace("_", " ")
