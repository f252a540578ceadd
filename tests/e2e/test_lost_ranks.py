"""Ranks that die or stop inside a collective: the others end in time, and say who, where and with
which stacks; with --max-restarts the run comes back by itself.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e.runs import TrainingProcess, read_jsonl
from tests.learner.recorded import NUM_PROMPTS, NUM_SAMPLES, NUM_STEPS
from tests.support import ranks
from tests.support.ranks import run_module

TIMEOUT_SECONDS, GRACE_SECONDS = 6.0, 10.0


@pytest.fixture
def config(tiny_checkpoint: Path, recorded_rollouts: Path, tmp_path: Path) -> Path:
    """A replay, without engines, with a checkpoint after every step."""
    (tmp_path / "prompts.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    settings = {
        "model": {"path": str(tiny_checkpoint)},
        "replay": str(recorded_rollouts),
        "parallel": {"tensor": 2, "timeout_seconds": TIMEOUT_SECONDS},
        "sync": {"timeout_seconds": 1.0},
        "data": {
            "tasks": [{"path": str(tmp_path / "prompts.jsonl"), "verifier": "exact"}],
            "num_held_out": 0,
        },
        "rollout": {
            "sampling": {"max_tokens": 32},
            "startup_timeout_seconds": 1.0,  # there is no engine
            "request_timeout_seconds": 1.0,
        },
        "learner": {"tokens_per_micro_batch": 256},
        "loop": {
            "num_steps": NUM_STEPS,
            "prompts_per_step": NUM_PROMPTS,
            "samples_per_prompt": NUM_SAMPLES,
        },
        "checkpoint": {"every": 1, "save_hf": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def wait_until(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("signum", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_the_others_say_who_is_missed(signum: int, config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ranks._server()  # ends with the thread that starts it
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(
            lambda: run_module(
                *("megatron_rl.train", config, f"run_dir={run_dir}"),
                ranks=2,
                must_succeed=False,
            )
        )
        wait_until(lambda: run.done() or (run_dir / "metrics.jsonl").is_file())
        assert not run.done(), run.result().stdout
        server = psutil.Process(ranks._server().pid)
        first, second = sorted(child.pid for child in server.children())[-2:]
        os.kill(second, signum)
        begin = time.monotonic()
        wait_until(lambda: run.done() or (run_dir / "error.txt").is_file())
        seconds = time.monotonic() - begin
        if signum == signal.SIGSTOP:
            os.kill(second, signal.SIGKILL)  # as the launcher does after its patience
        output = run.result().stdout
    limit = GRACE_SECONDS + (TIMEOUT_SECONDS if signum == signal.SIGSTOP else 0.0)
    assert seconds < limit, output
    told = (run_dir / "error.txt").read_text()
    assert told.startswith("rank 0"), told
    what = "has given no sign of life for" if signum == signal.SIGSTOP else "has ended"
    assert re.search(
        rf"rank 1 on \S+ \(process {second}, last in step \d+, phase \w+\) {what}", told
    )
    assert re.search(r"\(in step \d+, phase \w+;", told), told
    stacks = (run_dir / "logs" / "stacks_of_rank_0.txt").read_text()
    assert f"process {first}," in stacks and "train.py" in stacks


@pytest.mark.slow
def test_the_run_comes_back_by_itself(config: Path, tmp_path: Path) -> None:
    """By the real torchrun, whatever rank is killed."""
    run_dir = tmp_path / "run"
    run = TrainingProcess(
        [str(config), f"run_dir={run_dir}", "parallel.timeout_seconds=60"],
        num_ranks=2,
        run_dir=run_dir,
        variables={},
        launcher_options=["--max-restarts=2"],
    )
    try:
        for number in range(2):
            latest = run_dir / "checkpoints" / f"step_{2 + 3 * number:06d}"
            run.wait_until(latest.exists)
            os.kill(run.pid_of(f"rank {number}"), signal.SIGKILL)
            run.wait_until(lambda n=number: run.output.count("resumed after step") > n)
        assert run.wait() == 0, run.output
        assert run.left_after(10.0) == []
    finally:
        run.kill_all()
    assert [line["step"] for line in read_jsonl(run_dir / "metrics.jsonl")] == [
        *range(NUM_STEPS + 1)
    ]
