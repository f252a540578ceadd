"""A run of two engines of which one is killed and the other one frozen: it goes on, starts them
again, and both serve the present weights at its end.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_rl.process.guard import find_engine_core
from megatron_rl.rollout.recording import read_step
from tests.e2e.runs import TrainingProcess, read_jsonl, training

PER_STEP = 6
FOUND_SECONDS = 10.0
BACK_SECONDS = 240.0  # a start of vLLM on a busy host, and a step


def servers_of(run: TrainingProcess) -> list[psutil.Process]:
    """vLLM's API servers, in the order of the engines."""
    found = []
    for pid in run.pids():
        process = psutil.Process(pid)
        line = process.cmdline()
        if "vllm.entrypoints.openai.api_server" in line and "megatron_rl.process.guard" not in line:
            found.append(process)
    return sorted(found, key=lambda each: each.pid)


def url_of(server: psutil.Process) -> str:
    line = server.cmdline()
    return f"http://127.0.0.1:{line[line.index('--port') + 1]}"


def hit(
    run: TrainingProcess, process: psutil.Process, url: str, signum: int, run_dir: Path
) -> None:
    """Send the signal in a step's rollouts, and wait until the engine is told lost, and back."""
    num_steps = len(read_jsonl(run_dir / "metrics.jsonl"))
    run.wait_until(lambda: len(read_jsonl(run_dir / "metrics.jsonl")) > num_steps)
    num_lost, num_back = run.output.count("it is started again"), run.output.count("serves again")
    begin = time.monotonic()
    os.kill(process.pid, signum)
    # Known within FOUND_SECONDS; told at the end of the round, in which requests go elsewhere.
    run.wait_until(lambda: run.output.count("it is started again") > num_lost, 2 * FOUND_SECONDS)
    print(f"signal {signum} to {url}: told after {time.monotonic() - begin:.1f} s")
    run.wait_until(lambda: run.output.count("serves again") > num_back, BACK_SECONDS)
    print(f"back after {time.monotonic() - begin:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_goes_on_without_an_engine_and_takes_it_in_again(
    ahead: int, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(
        tmp_path,
        rollout={
            "dtype": "float32",
            "num_engines": 2,
            "num_threads": 1,
            "kv_cache_gib": 0.1,
            "max_num_seqs": 64,
            "max_policy_age": ahead,
            "sampling": {"max_tokens": 100},
        },
        loop={"num_steps": 1000, "prompts_per_step": PER_STEP, "samples_per_prompt": 4},
    )
    run_dir = tmp_path / "run"
    with training(config, num_ranks=0, run_dir=run_dir) as run:
        run.wait_until((run_dir / "metrics.jsonl").exists)
        first, second = servers_of(run)
        urls = {url_of(first), url_of(second)}
        hit(run, second, url_of(second), signal.SIGKILL, run_dir)
        core = find_engine_core(first.pid)
        assert core is not None
        hit(run, core, url_of(first), signal.SIGSTOP, run_dir)
        (run_dir / "stop").touch()
        assert run.wait() == 0, run.output
        assert run.left_after(10.0) == []
        output = "\n".join(line for line in run.output.splitlines() if not line.startswith("step"))
    lines = read_jsonl(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(len(lines)))
    received = [set(line["received"]) for line in read_jsonl(run_dir / "sync.jsonl")]
    assert received[0] == received[-1] == urls, output
    assert {len(each) for each in received} == {1, 2}
    used = []
    for line in lines[1:]:
        groups = [each.group for each in read_step(run_dir / "rollouts", line["step"])]
        used += [group.prompt.index for group in groups]
        versions = {v for g in groups for r in g.rollouts for v in r.weight_versions.tolist()}
        assert versions <= {-1, *range(line["step"] - 1 - ahead, line["step"])}
    assert used == list(range((len(lines) - 1) * PER_STEP))
