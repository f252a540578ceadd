"""Writes the metrics of a step to TensorBoard, metrics.jsonl, the console and the trackers of the
settings, on rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from megatron_rl.config import Config
from megatron_rl.observe.console import StepConsole, summary_table
from megatron_rl.observe.hints import Hints, evaluation_hints
from megatron_rl.observe.run_log import RunLog, read_metrics
from megatron_rl.observe.tensorboard import TensorBoardWriter
from megatron_rl.observe.trackers import finite, start_trackers
from megatron_rl.observe.trackers.tracker import Tracker


class Recorder:
    """Records a run in its folder. Every rank creates and calls a recorder; only rank 0 writes.

    Args:
        run_dir: folder of `metrics.jsonl` and `tensorboard/`; created if it does not exist.
        rank: of this process in the world.
        num_steps: of the whole run.
        last_step: the last step whose records are kept: the checkpoint's step when resuming, -1 in
            a new run.
        console: the console to print on; standard output by default.
        config: of the run, for its trackers and hints; None: it has none.

    Raises:
        ConfigError: a tracker cannot be started.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        rank: int,
        num_steps: int,
        last_step: int,
        console: Console | None = None,
        config: Config | None = None,
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
        self._trackers: list[Tracker] = []
        self._hints: Hints | None = None
        if config is not None:
            history = read_metrics(self._run_dir / "metrics.jsonl")
            self._trackers = start_trackers(
                config, self._run_dir, is_new=last_step < 0, history=history
            )
            self._hints = Hints(config, self._run_dir, history)
        self._console = StepConsole(
            num_steps=num_steps, num_done=max(last_step, 0), console=console
        )

    def __enter__(self) -> Recorder:
        if self._is_writer:
            self._console.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_writer:
            self._console.__exit__(*exception)
            self._tensorboard.close()
            self._log.close()
            for tracker in self._trackers:
                tracker.close()

    def phase(self, name: str) -> None:
        """Show the name of the current phase beside the progress bar."""
        if self._is_writer:
            self._console.show_phase(name)

    def say(self, message: str) -> None:
        """Print a message as a line of its own."""
        if self._is_writer:
            self._console.say(message)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the reduced metrics of a step, with those of an evaluation: one call per step."""
        if self._is_writer:
            self._log.write(step, metrics)
            self._tensorboard.write(step, metrics)
            for tracker in self._trackers:
                tracker.write(step, finite(metrics))
            self._console.show_step(step, metrics)
            for line in self._hints_of(metrics):
                self.say(line)

    def _hints_of(self, metrics: Mapping[str, float]) -> list[str]:
        if self._hints is None:
            return []
        of_step = self._hints.add(metrics)
        return [*filter(None, [of_step]), *evaluation_hints(metrics, self._run_dir)]

    def summarize(self, model: Path | None = None) -> None:
        """Print a table of the whole run, where its weights are, and the commands that show its
        curves.

        Args:
            model: folder of the final weights; None: none were written.
        """
        if self._is_writer:
            records = read_metrics(self._run_dir / "metrics.jsonl")
            self._console.console.print(summary_table(records, title=str(self._run_dir)))
            if model is not None:
                self.say(f"model: {model}")
            self.say(f"curves: tensorboard --logdir {self._run_dir / 'tensorboard'}")
            for tracker in self._trackers:
                self.say(f"tracked: {tracker.hint}")
