"""One place to hand a step's metrics to: TensorBoard, metrics.jsonl and the console, on rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console

from megatron_rl.observe.console import StepConsole, summary_table
from megatron_rl.observe.run_log import RunLog, read_metrics
from megatron_rl.observe.tensorboard import TensorBoardWriter


class Recorder:
    """Records a run in its folder; every rank makes one and calls it alike, rank 0 alone writes.

    Args:
        run_dir: holds `metrics.jsonl` and `tensorboard/`; made if it is not there.
        rank: of this process in the world.
        num_steps: of the whole run.
        last_step: the last step whose records stay: the checkpoint's on resume, -1 in a run from
            the start.
        console: where to; standard output by default.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        rank: int,
        num_steps: int,
        last_step: int,
        console: Console | None = None,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._is_writer = rank == 0
        if not self._is_writer:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._log = RunLog(self._run_dir / "metrics.jsonl", keep_through=last_step)
        self._tensorboard = TensorBoardWriter(
            self._run_dir / "tensorboard", purge_step=last_step + 1
        )
        self._console = StepConsole(
            num_steps=num_steps, num_done=max(last_step, 0), console=console
        )

    def __enter__(self) -> Recorder:
        if self._is_writer:
            self._console.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_writer:
            self._console.__exit__(kind, error, traceback)
            self._tensorboard.close()
            self._log.close()

    def station(self, name: str) -> None:
        """Names the station beside the progress bar."""
        if self._is_writer:
            self._console.show_station(name)

    def say(self, message: str) -> None:
        """Prints a line."""
        if self._is_writer:
            self._console.say(message)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records a step's reduced metrics, evaluation included: one call, one line a step."""
        if self._is_writer:
            self._log.write(step, metrics)
            self._tensorboard.write(step, metrics)
            self._console.show_step(step, metrics)

    def summarize(self) -> None:
        """Prints the run's table, from the start of the run, and how to see its curves."""
        if self._is_writer:
            records = read_metrics(self._run_dir / "metrics.jsonl")
            self._console.console.print(summary_table(records, title=str(self._run_dir)))
            self.say(f"curves: tensorboard --logdir {self._run_dir / 'tensorboard'}")
