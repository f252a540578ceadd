"""Writes the rollouts of steps beside the loop: on a thread, one step at a time, and only so many
steps are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from megatron_rl.rollout.recording import forget_before


class RolloutWriter:
    """Runs the writing of one step while the next step is being sampled; a context manager, at
    whose end everything has been written.

    Args:
        folder: takes the files.
        keep: number of steps whose files stay; 0: all.

    Example:
        with RolloutWriter(Path("runs/a/rollouts"), keep=200) as writer:
            writer.submit(12, lambda folder: write_step(folder, 12, ...))
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._pending: Future[None] | None = None

    def __enter__(self) -> RolloutWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()
        if kind is None:  # otherwise an error is being raised already
            self.wait()

    def submit(self, step: int, write: Callable[[Path], None]) -> None:
        """Have `write(folder)` called on the thread, once the step before has been written. Then
        the files of the oldest steps are deleted.

        Raises:
            Exception: what the writing of the step before raised.
        """
        self.wait()
        self._pending = self._executor.submit(self._write, step, write)

    def wait(self) -> None:
        """Return once everything that was submitted has been written.

        Raises:
            Exception: what the writing raised.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, write: Callable[[Path], None]) -> None:
        write(self._folder)
        if self._keep:
            forget_before(self._folder, step - self._keep + 1)
