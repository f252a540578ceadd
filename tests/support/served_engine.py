"""The engine of `python -m megatron_rl.serve`, as a user starts it, for runs that are given theirs.

A run publishes its own weights before it samples, so that one engine does for many runs, one after
the other.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.process.lifetime import die_with_parent
from megatron_rl.records import TOKEN_VARIABLE
from tests.support.ports import free_port
from tests.support.ranks import ROOT

SETTINGS = "rollout: {dtype: float32, num_threads: 1, kv_cache_gib: 0.1, max_num_seqs: 64}\n"
STOP_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EndedEngine:
    """Example: EndedEngine(code=130, stderr="stopped by SIGINT: the engine at ... ends too")."""

    code: int
    stderr: str


class ServedEngine:
    """A float32 engine, started when it is first asked for, and again after it was stopped.

    Args:
        model: that it loads; runs of the same shape may publish to it.
        folder: takes its run folders, `run_0` the first one.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._num_starts = 0
        self.greeting = ""  # what it printed before it was ready
        self.port = 0
        self.run_dir = folder

    @property
    def url(self) -> str:
        """Where it answers."""
        if self._process is None:
            self._start()
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        """What it wants to be told."""
        if self._process is None:
            self._start()
        return (self.run_dir / "engine_token").read_text().strip()

    @property
    def pid(self) -> int:
        """Of `megatron_rl.serve`; all of the engine's processes are its descendants."""
        if self._process is None:
            self._start()
        assert self._process is not None
        return self._process.pid

    def overrides(self) -> list[str]:
        """The settings by which a run takes it."""
        return ["rollout.num_engines=0", f"rollout.urls=['{self.url}']"]

    def variables(self) -> dict[str, str]:
        """The environment by which a run takes it."""
        return {TOKEN_VARIABLE: self.token}

    def interrupt(self) -> EndedEngine:
        """Ctrl-C."""
        process, self._process = self._process, None
        assert process is not None and process.stderr is not None
        process.send_signal(signal.SIGINT)
        return EndedEngine(code=process.wait(STOP_SECONDS), stderr=process.stderr.read())

    def stop(self) -> None:
        """End it where it runs; its guard sees to the server below it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self.run_dir = self._folder / f"run_{self._num_starts}"
        self._num_starts += 1
        self.port = free_port()
        config = self._folder / "engine.yaml"
        config.write_text(SETTINGS)
        settings = [f"run_dir={self.run_dir}", f"model.path={self._model}"]
        settings.append(f"rollout.port={self.port}")
        without_token = {name: v for name, v in os.environ.items() if name != TOKEN_VARIABLE}
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rl.serve", str(config), *settings],
            cwd=ROOT,
            env=without_token | {"OMP_NUM_THREADS": "1"},
            preexec_fn=die_with_parent,  # a killed test session leaves no engine
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stderr is not None
        self._process = process
        lines = [""]
        while not lines[-1].startswith("ready at"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            lines.append(line)
        self.greeting = "".join(lines)
