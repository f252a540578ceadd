"""Runs a training for a given time, kills one of its engines again and again, and draws what the
run's processes use: memory, file descriptors, threads and disk. At the end the run is asked to
stop, and what it recorded is checked: every step once, every prompt once, every engine back. Memory
that processes share is counted once (PSS).

    python tools/soak.py CONFIG --work DIR --seconds 7200 --kill-seconds 300 [key=value ...]

The settings should start at least two engines, and are of one replica of the model. Writes
DIR/soak.jsonl (a line a second) and DIR/soak.png, and prints a table: each figure's mean over the
second and over the last quarter of the time, for the learner's processes and for the engines'. The
exit status is 1 if something is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import psutil
from matplotlib import pyplot

from megatron_rl.config.file import load_config
from megatron_rl.errors import EngineError
from megatron_rl.observe.run_log import read_metrics
from megatron_rl.process.tool import run_tool
from megatron_rl.rollout.recording import read_step

ROOT = Path(__file__).parents[1]
ENDLESS = ("loop.num_steps=1000000", "rollout.max_restarts=1000000")
STOP_SECONDS = 300.0  # for the step in which the run is asked to stop
FIGURES = {
    "learner_mib": "memory of the learner, MiB",
    "engines_mib": "memory of the engines, MiB",
    "fds": "file descriptors of the learner",
    "threads": "threads of the learner",
    "disk_mib": "run folder, MiB",
}


def processes_of(root: psutil.Process) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The living descendants: those of the learner, and those of the engines, which are the guards
    and what they have started.
    """
    children = root.children(recursive=True)
    guards = [each for each in children if "megatron_rl.process.guard" in command_of(each)]
    engines = {each.pid: each for each in guards}
    for guard in guards:
        with contextlib.suppress(psutil.Error):
            engines |= {each.pid: each for each in guard.children(recursive=True)}
    learner = [root, *(each for each in children if each.pid not in engines)]
    return learner, list(engines.values())


def command_of(process: psutil.Process) -> str:
    """Its command line; "" if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def sample(root: psutil.Process, run_dir: Path) -> dict[str, float]:
    """The figures of now."""
    learner, engines = processes_of(root)
    figures = dict.fromkeys(FIGURES, 0.0)
    for name, group in (("learner_mib", learner), ("engines_mib", engines)):
        for process in group:
            with contextlib.suppress(psutil.Error):
                figures[name] += process.memory_full_info().pss / 2**20
    for process in learner:
        with contextlib.suppress(psutil.Error):
            figures["fds"] += process.num_fds()
            figures["threads"] += process.num_threads()
    for folder, _, names in os.walk(run_dir):
        for name in names:
            with contextlib.suppress(OSError):  # the run deletes old files
                figures["disk_mib"] += os.stat(os.path.join(folder, name)).st_size / 2**20
    return figures


def kill_an_engine(root: psutil.Process, chance: random.Random) -> bool:
    """SIGKILL to one API server; whether there was one."""
    servers = [
        process
        for process in processes_of(root)[1]
        if "vllm.entrypoints" in (line := command_of(process)) and "process.guard" not in line
    ]
    if not servers:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        chance.choice(servers).kill()
    return True


class UsedPrompts:
    """The prompts of each step, read before the run deletes the step's rollouts
    (`rollout.keep_steps`).
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._num_read = 0  # bytes of the metrics, which grow for hours
        self.of_step: dict[int, list[int]] = {}

    def look(self) -> None:
        """Read the steps that are new; those that are being written are read next time."""
        with (self._run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(self._num_read)
            lines = [line for line in file if line.endswith(b"\n")]
        self._num_read += sum(map(len, lines))
        last = max(self.of_step, default=0)
        for step in range(last + 1, int(json.loads(lines[-1])["step"]) if lines else 0):
            self.read(step)

    def read(self, step: int) -> None:
        """Read one step."""
        groups = read_step(self._run_dir / "rollouts", step)
        self.of_step[step] = [scored.group.prompt.index for scored in groups]


def soak(
    process: subprocess.Popen[bytes],
    run_dir: Path,
    lines: Path,
    used: UsedPrompts,
    *,
    seconds: float,
    kill_seconds: float,
) -> list[dict[str, Any]]:
    """Sample and kill for so long, from the first step on, then ask the run to stop; the samples.

    Raises:
        EngineError: the run has ended by itself.
    """
    root, chance, samples = psutil.Process(process.pid), random.Random(0), []
    metrics = run_dir / "metrics.jsonl"
    # An engine that dies while the run starts is the end of the run.
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n")):
        time.sleep(1.0)
    begin = time.monotonic()
    next_kill = begin + kill_seconds
    with lines.open("w") as file:
        while time.monotonic() < begin + seconds:
            if process.poll() is not None:
                raise EngineError(
                    f"{run_dir}: expected the run to go on for {seconds:g} s, got code "
                    f"{process.returncode} after {time.monotonic() - begin:.0f} s; see "
                    f"{lines.with_name('console.log')}"
                )
            is_kill = time.monotonic() >= next_kill and kill_an_engine(root, chance)
            if is_kill:
                next_kill += kill_seconds
            found = {"seconds": time.monotonic() - begin, "is_kill": is_kill}
            samples.append(found | sample(root, run_dir))
            used.look()
            print(json.dumps(samples[-1]), file=file, flush=True)
            time.sleep(1.0)
    (run_dir / "stop").touch()
    process.wait(STOP_SECONDS)
    return samples


def losses(run_dir: Path, used: UsedPrompts) -> list[str]:
    """What the run has lost: steps, prompts, engines; a line each."""
    steps = [int(line["step"]) for line in read_metrics(run_dir / "metrics.jsonl")]
    told = [] if steps == list(range(len(steps))) else [f"steps: {steps}"]
    for step in steps:
        if step and step not in used.of_step:
            used.read(step)
    prompts = [prompt for step in steps[1:] for prompt in used.of_step[step]]
    if len(prompts) != len({*prompts}):
        told.append("prompts: one was used twice")
    # At the end the prompts of two steps may be in flight.
    num_late = 2 * max((len(each) for each in used.of_step.values()), default=0)
    if missing := sorted(set(range(len(prompts) - num_late)) - {*prompts}):
        told.append(f"prompts: {len(missing)} were skipped, the first is {missing[0]}")
    syncs = [json.loads(line) for line in (run_dir / "sync.jsonl").read_text().splitlines()]
    all_engines = set().union(*(line["received"] for line in syncs))
    served = {url: sum(url in line["received"] for line in syncs) for url in all_engines}
    told += [f"engine {url}: in 1 publication only" for url, count in served.items() if count == 1]
    return told


def draw(samples: Sequence[dict[str, Any]], output: Path) -> None:
    """A panel for each figure, over minutes; a line where an engine was killed."""
    minutes = [each["seconds"] / 60 for each in samples]
    killed = [each["seconds"] / 60 for each in samples if each["is_kill"]]
    figure, panels = pyplot.subplots(len(FIGURES), 1, figsize=(8, 9), sharex=True)
    for axes, (name, label) in zip(panels, FIGURES.items(), strict=True):
        axes.plot(minutes, [each[name] for each in samples], linewidth=1.2, color="#2563a8")
        for minute in killed:
            axes.axvline(minute, color="#c23b3b", linewidth=0.6)
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_ylim(0, 1.15 * max(each[name] for each in samples))
        axes.margins(x=0)
        axes.grid(alpha=0.25)
    panels[-1].set_xlabel("minutes; red: an engine is killed")
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def quarters(samples: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """The mean over the second and over the last quarter."""
    size = max(1, len(samples) // 4)
    second, last = samples[size : 2 * size] or samples, samples[-size:]
    return tuple(sum(each[name] for each in part) / len(part) for part in (second, last))


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, draw, and say what was lost; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--work", type=Path, required=True, help="folder of run and picture")
    parser.add_argument("--seconds", type=float, default=7200.0)
    parser.add_argument("--kill-seconds", type=float, default=300.0)
    options = parser.parse_intermixed_args(argv)  # settings come after the options
    return run_tool("soak", lambda: _soak(options))


def _soak(options: argparse.Namespace) -> int:
    run_dir = options.work / "run"
    settings = [f"run_dir={run_dir}", *ENDLESS, *options.overrides]
    num_ranks = load_config(options.config, settings).parallel.replica_size
    command = [sys.executable, "-m", "megatron_rl.process.agent"]
    command += [f"--nproc_per_node={num_ranks}"]
    command += ["-m", "megatron_rl.train", str(options.config), *settings]
    options.work.mkdir(parents=True, exist_ok=True)
    used = UsedPrompts(run_dir)
    with (options.work / "console.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            samples = soak(
                process,
                run_dir,
                options.work / "soak.jsonl",
                used,
                seconds=options.seconds,
                kill_seconds=options.kill_seconds,
            )
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    draw(samples, options.work / "soak.png")
    told = losses(run_dir, used)
    if process.returncode:
        told.append(f"the run: it ended with code {process.returncode}")
    num_steps = len(read_metrics(run_dir / "metrics.jsonl")) - 1
    num_killed = sum(each["is_kill"] for each in samples)
    print(f"{options.seconds:g} s, {num_steps} steps, {num_killed} engines killed")
    for name, label in FIGURES.items():
        second, last = quarters(samples, name)
        print(f"{label}: {second:.0f} in the second quarter, {last:.0f} in the last")
    print("\n".join(["lost:", *told]) if told else "nothing lost")
    return int(bool(told))


if __name__ == "__main__":
    sys.exit(main())
