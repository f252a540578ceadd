"""Runs one training run to its end, for tools that compare runs with each other.

Each run is a separate torchrun process, whose output is written to `<run_dir>/console.log`. A
finished run is not repeated, and a run that was stopped is resumed. An engine can serve several
runs, one after another, because a run publishes its own weights before it samples.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from megatron_rl.config import Config
from megatron_rl.config.file import load_config
from megatron_rl.engine.server import Engine
from megatron_rl.engine.start import start_engines_of
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.process.command import ERROR_FILE
from megatron_rl.process.lifetime import die_with_parent, register_cleanup, unregister_cleanup
from megatron_rl.records import TOKEN_VARIABLE

DONE_FILE = "done.json"  # the settings of a finished run
TAIL_LINES = 15


@contextmanager
def shared_engines(config: Config, folder: Path, *, count: int) -> Iterator[list[Engine]]:
    """Start engines for `run_to_the_end`, wait until they are ready, and stop them on exit.

    Args:
        config: settings of the runs; `rollout.num_engines`, `rollout.urls` and `rollout.placement`
            are not used.
        folder: the folder for the engines' model and logs.
        count: number of engines.
    Yields:
        The engines.
    Raises:
        EngineError: an engine did not start.
    """
    rollout = replace(config.rollout, num_engines=count, urls=[], placement="auto")
    engines = start_engines_of(replace(config, rollout=rollout), folder)
    with ExitStack() as stack:
        for engine in engines:
            register_cleanup(engine.stop)
            stack.callback(unregister_cleanup, engine.stop)
            stack.enter_context(engine)
        for engine in engines:
            engine.wait_ready()
        yield engines


def run_to_the_end(
    config: str | Path,
    overrides: Sequence[str],
    run_dir: Path,
    *,
    engine: Engine | None = None,
    num_threads: int = 0,
) -> Path:
    """Train with `config` and `overrides` in `run_dir`, with one replica of the model.

    Args:
        config: YAML file of the run.
        overrides: further settings, `key=value`.
        engine: a running engine with the rollout settings of this run, which no other run may use
            at the same time; None: the run starts its own engines.
        num_threads: threads per learner rank; 0: torchrun's default.
    Returns:
        `run_dir`.
    Raises:
        ConfigError: the settings cannot be loaded, or `run_dir` holds a finished run with other
            settings.
        EngineError: the run failed; the message is the error that it reported, or the end of its
            output.
    """
    settings = load_config(config, [*overrides, f"run_dir={run_dir}"])
    if is_finished(config, overrides, run_dir):
        return run_dir
    num_ranks = settings.parallel.replica_size
    command = [sys.executable, "-m", "megatron_rl.process.agent"]
    command += ["--nproc_per_node", str(num_ranks), "-m", "megatron_rl.train", str(config)]
    command += [*overrides, f"run_dir={run_dir}"]
    environment = dict(os.environ)
    if engine is not None:
        engine.check()
        command += ["rollout.num_engines=0", f"rollout.urls=[{engine.address.url}]"]
        environment[TOKEN_VARIABLE] = engine.address.token
    if num_threads:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "console.log").open("ab") as log:
        code = _wait(command, environment, log)
    if code != 0:
        raise EngineError(f"{run_dir}: expected the run to succeed, got {_failure_of(run_dir)}")
    (run_dir / DONE_FILE).write_text(json.dumps(_settings_of(config, overrides)) + "\n")
    return run_dir


def is_finished(config: str | Path, overrides: Sequence[str], run_dir: Path) -> bool:
    """Whether `run_dir` holds a finished run of these settings.

    Raises:
        ConfigError: it holds a finished run of other settings.
    """
    done, wanted = run_dir / DONE_FILE, _settings_of(config, overrides)
    if done.is_file() and json.loads(done.read_text()) != wanted:
        raise ConfigError(
            f"{done}: expected a run of {wanted}, got {done.read_text().strip()}; choose another "
            "output folder, or delete this one"
        )
    return done.is_file()


def _settings_of(config: str | Path, overrides: Sequence[str]) -> dict[str, object]:
    return {"config": str(config), "overrides": list(overrides)}


def _wait(command: list[str], environment: dict[str, str], log: BinaryIO) -> int:
    """Run a command, which ends together with this process, and return its exit code."""
    parent = os.getpid()
    # To the kernel, this thread is the parent; it remains alive, because it waits for the process.
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # On SIGTERM torchrun ends its ranks.
        preexec_fn=lambda: die_with_parent(signal.SIGTERM, parent_pid=parent),
    )
    register_cleanup(process.terminate)
    try:
        return process.wait()
    finally:
        unregister_cleanup(process.terminate)
        if process.poll() is None:
            process.terminate()
            process.wait()


def _failure_of(run_dir: Path) -> str:
    """The error that the run reported, or the last lines of its output."""
    error = run_dir / ERROR_FILE
    if error.is_file():
        return error.read_text().strip()
    return "\n".join((run_dir / "console.log").read_text().splitlines()[-TAIL_LINES:])
