"""Bitwise continuation: a run of TP2 x DP2 is killed at seeded moments of its steps, and ends with
the bits of the run that nobody killed: weights, moments, state, metrics, rollouts and log-probs.

The engines are two processes of `tests/support/hash_engine.py`, because vLLM's log-probs depend, in
their rounding, on what else is in a batch. A killed engine is started again by the test, as a
supervisor would do it; a run that lost a rank is started again as torchrun --max-restarts does.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml

from megatron_rl.records import TOKEN_VARIABLE
from megatron_rl.rollout.recording import read_recomputed, read_step
from tests.e2e.reward import COUNT_VARIABLE
from tests.e2e.runs import read_jsonl
from tests.support import ranks
from tests.support.checkpoint_reader import read_tensors
from tests.support.ports import free_port
from tests.support.ranks import FinishedRun, rank_environment, run_module

TOKEN = "token of the engines"
NUM_STEPS, PROMPTS, SAMPLES = 6, 4, 4
CHECKPOINT_EVERY = 2
NUM_RANKS = 4
START_SECONDS = 60.0
TARGETS = ("rank 0", "rank 1", "rank 2", "rank 3", "engine", "reward worker")
MOMENTS = ("rollout", "reward", "learner", "publish", "checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """Example: Kill(target="rank 2", moment="learner", step=3, delay=0.21): in the third step, 0.21
    s after its last reward.
    """

    target: str
    moment: str
    step: int
    delay: float  # seconds after the event that begins the moment


def kills(count: int, seed: int) -> list[Kill]:
    """All targets and moments in turn; steps and delays are drawn."""
    chance = random.Random(seed)
    chosen = []
    for number in range(count):
        moment = MOMENTS[number % len(MOMENTS)]
        if number % 4 == 3:
            target = ("engine", "reward worker")[number // 4 % 2]
        else:
            target = f"rank {number // 2 % NUM_RANKS}"
        if target == "reward worker":
            moment = "reward"
        if target == "engine":
            moment = ("rollout", "publish")[number // 4 % 3 // 2]
        step = chance.randint(2, NUM_STEPS - 1)
        if moment == "checkpoint":
            step -= step % CHECKPOINT_EVERY
        longest = {"rollout": 0.1, "reward": 0.02, "learner": 1.0, "publish": 0.05}
        chosen.append(
            Kill(
                target=target,
                moment=moment,
                step=step,
                delay=chance.uniform(0.0, longest.get(moment, 0.1)),
            )
        )
    return chosen


class HashEngines:
    """Two engines, and the file of their events."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self.events = model, folder / "events"
        self.events.touch()
        self.ports = [free_port(), free_port()]
        self.processes = [self._start(port) for port in self.ports]

    @property
    def overrides(self) -> list[str]:
        urls = ",".join(f"http://127.0.0.1:{port}" for port in self.ports)
        return ["rollout.num_engines=0", f"rollout.urls=[{urls}]"]

    def kill_and_start(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()
        time.sleep(0.5)
        self.processes[number] = self._start(self.ports[number])

    def count(self, what: str) -> int:
        return sum(line.startswith(what) for line in self.events.read_text().splitlines())

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        for port in self.ports:
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 0.2).close()
                    break
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        variables = {TOKEN_VARIABLE: TOKEN, "MEGATRON_RL_UPDATE_TIMEOUT": "60"}
        command = [sys.executable, "-m", "tests.support.hash_engine", str(port)]
        return subprocess.Popen(
            [*command, str(self._model), str(self.events)], env=rank_environment() | variables
        )


@contextmanager
def hash_engines(model: Path, folder: Path) -> Iterator[HashEngines]:
    folder.mkdir(parents=True, exist_ok=True)
    engines = HashEngines(model, folder)
    try:
        engines.wait_ready()
        yield engines
    finally:
        engines.stop()


class Started:
    """A run on forked ranks, beside which the test goes on."""

    def __init__(self, config: Path, run_dir: Path, engines: HashEngines) -> None:
        self.scored, self.run_dir = run_dir.parent / f"{run_dir.name}_scored", run_dir
        self.scored.write_bytes(b"")
        ranks._server()  # ends with the thread that starts it
        variables = {TOKEN_VARIABLE: TOKEN, COUNT_VARIABLE: str(self.scored)}
        self._thread = ThreadPoolExecutor(1)
        self.finished: Future[FinishedRun] = self._thread.submit(
            lambda: run_module(
                "megatron_rl.train",
                config,
                f"run_dir={run_dir}",
                *engines.overrides,
                ranks=NUM_RANKS,
                must_succeed=False,
                variables=variables,
            )
        )

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """False if the run has ended before."""
        while not happened():
            if self.finished.done():
                return False
            time.sleep(0.002)
        return True

    def ranks(self) -> list[int]:
        """Process ids, in order of rank: they are forked one after the other."""
        server = ranks._server().pid
        return sorted(child.pid for child in psutil.Process(server).children())[:NUM_RANKS]

    def workers(self) -> list[int]:
        """Scoring processes."""
        found = []
        for rank in self.ranks():
            for child in psutil.Process(rank).children(recursive=True):
                if "megatron_rl.reward.worker" in " ".join(child.cmdline()):
                    found.append(child.pid)
        return sorted(found)

    def num_steps(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") - 1 if path.is_file() else -1


def reach(kill: Kill, run: Started, engines: HashEngines) -> bool:
    """Wait for the moment; False if the run ended before."""
    if not run.wait_until(lambda: run.num_steps() >= kill.step - 1):
        return False
    scored = len(run.scored.read_bytes())
    asked, updates = engines.count("generate"), engines.count("update")
    partial = run.run_dir / "checkpoints" / f".partial_step_{kill.step:06d}"
    happened = {
        "rollout": lambda: engines.count("generate") > asked,
        "reward": lambda: len(run.scored.read_bytes()) > scored,
        "learner": lambda: len(run.scored.read_bytes()) >= scored + PROMPTS * SAMPLES,
        "publish": lambda: engines.count("update") > updates,
        "checkpoint": partial.exists,
    }[kill.moment]
    is_there = run.wait_until(happened)
    time.sleep(kill.delay)
    return is_there


def strike(kill: Kill, run: Started, engines: HashEngines, number: int) -> None:
    if kill.target == "engine":
        engines.kill_and_start(number % 2)
        return
    if kill.target == "reward worker":
        victim = run.workers()[number % 2]
    else:
        victim = run.ranks()[int(kill.target.removeprefix("rank "))]
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)


def contents(run_dir: Path) -> dict[str, Any]:
    """All that must be equal, but for times and the engine's address."""
    last = run_dir / "checkpoints" / f"step_{NUM_STEPS:06d}"
    found: dict[str, Any] = dict(read_tensors(last))
    for number, line in enumerate(read_jsonl(run_dir / "metrics.jsonl")):
        for key, value in line.items():
            if not key.startswith(("speed/", "rollout/idle")) and "time" not in key:
                found[f"metrics {number} {key}"] = value
    for step in range(1, NUM_STEPS + 1):
        for scored in read_step(run_dir / "rollouts", step):
            prompt = scored.group.prompt
            found[f"scores {step} {prompt.index}"] = scored.scores
            for sample, rollout in enumerate(scored.group.rollouts):
                name = f"rollout {step} {prompt.index} {sample}"
                found[name] = (prompt, replace(rollout, engine="").text)
                for field in ("token_ids", "loss_mask", "rollout_logprobs", "weight_versions"):
                    found[f"{name} {field}"] = getattr(rollout, field)
        for key, values in read_recomputed(run_dir / "rollouts", step).items():
            found[f"recomputed {step} {key}"] = values
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        name
        for name in sorted({*before, *after}, key=str)
        if name not in before or name not in after or not _equal(before[name], after[name])
    ]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return one == other


def run_whole(config: Path, run_dir: Path, engines: HashEngines) -> dict[str, Any]:
    finished = Started(config, run_dir, engines).finished.result()
    assert finished.returncode == 0, finished.stdout[-6000:]
    return contents(run_dir)


def run_killed(
    kill: Kill, number: int, config: Path, run_dir: Path, engines: HashEngines
) -> tuple[dict[str, Any], int]:
    """The contents of a run that was killed, and how often it was started."""
    run = Started(config, run_dir, engines)
    assert reach(kill, run, engines), run.finished.result().stdout[-6000:]
    strike(kill, run, engines, number)
    finished, num_starts = run.finished.result(), 1
    while finished.returncode:
        # Only the loss of a rank ends a run.
        assert kill.target.startswith("rank ") and num_starts < 3, finished.stdout[-6000:]
        engines.wait_ready()
        finished, num_starts = Started(config, run_dir, engines).finished.result(), num_starts + 1
    return contents(run_dir), num_starts


@pytest.fixture
def config(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    return write_config(
        tmp_path,
        parallel={"tensor": 2},
        sync={"probe_num_tokens": 0},
        rollout={
            "dtype": "float32",
            "sampling": {"max_tokens": 40},
            "health_timeout_seconds": 4.0,
        },
        learner={
            "tokens_per_micro_batch": 256,
            "recompute": "always",
            "optimizer": {"learning_rate": 1e-3},
        },
        checkpoint={"every": CHECKPOINT_EVERY, "save_hf": False},
        loop={
            "num_steps": NUM_STEPS,
            "prompts_per_step": PROMPTS,
            "samples_per_prompt": SAMPLES,
        },
    )


def compare_kills(
    count: int, config: Path, model: Path, folder: Path, *, seed: int = 0
) -> list[str]:
    """Kill `count` runs; what differs, one line each."""
    with hash_engines(model, folder / "engines") as engines:
        whole = run_whole(config, folder / "whole", engines)
        told = []
        for number, kill in enumerate(kills(count, seed)):
            found, num_starts = run_killed(
                kill, number, config, folder / f"killed_{number}", engines
            )
            wrong = differences(whole, found)
            verdict = f"{len(wrong)} differ, {wrong[:3]}" if wrong else f"{len(whole)} equal"
            print(f"{kill}: {num_starts} start(s), {verdict}", flush=True)
            told += [f"{kill}: {name}" for name in wrong[:5]]
    return told


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rank 0", "rank 3"])
def test_ahead_every_prompt_is_used_once_over_a_kill(
    target: str, config: Path, sharp_checkpoint: Path, tmp_path: Path
) -> None:
    """Two replicas that sample ahead: no prompt is trained on twice or skipped, and what was
    finished when the last checkpoint was written is not sampled again.
    """
    settings = yaml.safe_load(config.read_text())
    settings["rollout"] |= {"max_policy_age": 1}
    config.write_text(yaml.safe_dump(settings))
    kill = Kill(target=target, moment="learner", step=4, delay=0.2)
    run_dir = tmp_path / "run"
    with hash_engines(sharp_checkpoint, tmp_path / "engines") as engines:
        run = Started(config, run_dir, engines)
        assert reach(kill, run, engines), run.finished.result().stdout[-6000:]
        strike(kill, run, engines, 0)
        assert run.finished.result().returncode
        latest = int((run_dir / "checkpoints" / "latest").read_text().strip()[5:])
        kept = [each.group.prompt for each in read_step(run_dir / "rollouts" / "ahead", latest)]
        assert kept, "the case must have finished groups at its checkpoint"
        num_asked = len(engines.events.read_text().splitlines())
        finished = Started(config, run_dir, engines).finished.result()
        assert finished.returncode == 0, finished.stdout[-6000:]
        asked = engines.events.read_text().splitlines()[num_asked:]
    assert f"resumed after step {latest}" in finished.stdout
    again = {f"generate {list(prompt.token_ids)}" for prompt in kept} & {*asked}
    assert again == set()
    used = [
        scored.group.prompt.index
        for step in range(1, NUM_STEPS + 1)
        for scored in read_step(run_dir / "rollouts", step)
    ]
    assert sorted(used) == list(range(NUM_STEPS * PROMPTS))


@pytest.mark.slow
def test_twenty_kills_change_no_bit(config: Path, sharp_checkpoint: Path, tmp_path: Path) -> None:
    assert compare_kills(20, config, sharp_checkpoint, tmp_path) == []
