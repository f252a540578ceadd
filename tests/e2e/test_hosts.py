"""A run on three hosts: two with two learner ranks each (DP2 x TP2, torchrun), one with two
engines, weights over process groups. Its curves are those of the same run on one host; then its
cables are cut, in each phase, and it goes on afterwards. docs/engines.md has the last result.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rl.learner.model.checkpoint_files import latest_checkpoint
from megatron_rl.records import TOKEN_VARIABLE
from tests.e2e.reward import COUNT_VARIABLE
from tests.e2e.runs import read_jsonl
from tests.support.hosts import Host, joined_hosts, start_on, why_not
from tests.support.ranks import ROOT, rank_environment

START_SECONDS = 600.0  # of a run whose machine others use, too
TIMEOUT_SECONDS = 60.0  # of a collective
REQUEST_SECONDS = 20.0
LEFT_SECONDS = 30.0
# Of engines that load beside other processes.
PATIENT = (
    "parallel.timeout_seconds=600",
    "rollout.startup_timeout_seconds=500",
    "rollout.request_timeout_seconds=500",
)
NUM_STEPS = 2
COMPARED = ("reward/mean", "discrepancy/mean", "constraint/lambda", "learner/grad_norm")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]


class ClusterRun:
    """One launch of the run: torchrun on both learner hosts."""

    def __init__(self, hosts: list[Host], config: Path, run_dir: Path, *overrides: str) -> None:
        self.hosts, self.run_dir = hosts, run_dir
        number = len(list(run_dir.glob("launch_*_0.log")))
        self.logs = [run_dir / f"launch_{number}_{node}.log" for node in (0, 1)]
        variables = rank_environment() | {
            "NPROC": "2",
            "NNODES": "2",
            "MASTER_ADDR": hosts[0].address,
            COUNT_VARIABLE: str(run_dir / "scored"),
        }
        del variables["GLOO_SOCKET_IFNAME"]
        (run_dir / "scored").unlink(missing_ok=True)
        command = [ROOT / "launch/torchrun.sh", "megatron_rl.train", config, f"run_dir={run_dir}"]
        self.processes = [
            start_on(
                host,
                [*command, *overrides],
                self.logs[node],
                ROOT,
                variables | {"NODE_RANK": str(node)},
            )
            for node, host in enumerate(hosts)
        ]

    @property
    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def wait(self, seconds: float = START_SECONDS) -> list[int]:
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            assert time.monotonic() < deadline, f"still running after {seconds} s:\n{self.output}"
            time.sleep(0.1)
        return [process.returncode for process in self.processes]

    def wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not happened():
            assert all(p.poll() is None for p in self.processes), f"it ended:\n{self.output}"
            assert time.monotonic() < deadline, f"waited {START_SECONDS} s:\n{self.output}"
            time.sleep(0.01)

    def left(self) -> list[int]:
        """What is still there of the run LEFT_SECONDS after its end."""
        deadline = time.monotonic() + LEFT_SECONDS
        while (pids := [p for host in self.hosts for p in host.pids()]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)
        return pids


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with joined_hosts(3) as hosts:
        yield hosts


def num_scored(run_dir: Path) -> int:
    path = run_dir / "scored"
    return path.stat().st_size if path.exists() else 0


def latest_step(run_dir: Path) -> int:
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    return int(checkpoint.name.removeprefix("step_")) if checkpoint else 0


def write_cluster_config(write_config: Callable[..., Path], folder: Path) -> Path:
    return write_config(
        folder,
        parallel={"tensor": 2, "timeout_seconds": TIMEOUT_SECONDS},
        rollout={
            "dtype": "float32",
            "num_threads": 1,
            "kv_cache_gib": 0.1,
            "max_num_seqs": 64,
            "num_engines": 2,
            "startup_timeout_seconds": TIMEOUT_SECONDS - 5,
            "request_timeout_seconds": REQUEST_SECONDS,
            "max_retries": 1,
            "sampling": {"max_tokens": 16},
        },
        sync={"timeout_seconds": 20.0},
        checkpoint={"every": 1, "save_hf": False},
        loop={"num_steps": NUM_STEPS, "prompts_per_step": 4, "samples_per_prompt": 8},
    )


def test_a_run_on_three_hosts(
    hosts: list[Host], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_cluster_config(write_config, tmp_path)
    run_dir = tmp_path / "hosts"
    run_dir.mkdir()
    cluster = ("rollout.placement=nodes", "sync.transport=collective")
    start_engines(hosts[2], config, run_dir, cluster)
    run = ClusterRun(hosts[:2], config, run_dir, *cluster)
    assert run.wait() == [0, 0], run.output
    assert run.left() == []
    assert f"http://{hosts[2].address}:" in run.output
    check_same_curves(hosts[2], config, run_dir, tmp_path / "one_host")
    report = {}
    for phase, cut in (("rollout", 2), ("sync", 2), ("learner", 1)):
        report[phase] = cut_and_go_on(hosts, config, run_dir, cluster, phase, hosts[cut])
    print(json.dumps(report, indent=1))


def test_engines_on_every_learner_host(
    hosts: list[Host], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Started by the run, on the address by which the other host is reached."""
    config = write_cluster_config(write_config, tmp_path)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run = ClusterRun(hosts[:2], config, run_dir, *PATIENT, "sync.transport=collective")
    assert run.wait() == [0, 0], run.output
    assert run.left() == []
    first, second = (re.escape(host.address) for host in hosts[:2])
    places = rf"engines: http://{first}:\d+ \(node 0\), http://{second}:\d+ \(node 1\)"
    assert re.search(places, run.output), run.output
    assert [line["step"] for line in read_jsonl(run_dir / "metrics.jsonl")] == [0, 1, 2]


def start_engines(host: Host, config: Path, run_dir: Path, overrides: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "megatron_rl.serve", config, f"run_dir={run_dir}", *overrides]
    options = [*PATIENT, "--host", host.interface, "--engines", "2"]
    log = run_dir / "serve.log"
    server = start_on(host, [*command, *options], log, ROOT, rank_environment())
    deadline = time.monotonic() + START_SECONDS
    while "ready at" not in log.read_text():
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def check_same_curves(host: Host, config: Path, run_dir: Path, alone: Path) -> None:
    """All ranks on the host of the engines, and weights through its shared memory. The engines'
    rounding depends on which samples they compute together.
    """
    alone.mkdir()
    urls = [json.loads(path.read_text())["url"] for path in (run_dir / "engines").glob("*.json")]
    overrides = [*PATIENT, f"run_dir={alone}"]
    overrides += ["rollout.num_engines=0", f"rollout.urls=[{','.join(urls)}]"]
    token = (run_dir / "engine_token").read_text().strip()
    command = [ROOT / "launch/torchrun.sh", "megatron_rl.train", config, *overrides]
    variables = rank_environment() | {"NPROC": "4", TOKEN_VARIABLE: token}
    run = start_on(host, command, alone / "launch.log", ROOT, variables)
    assert run.wait(START_SECONDS) == 0, (alone / "launch.log").read_text()
    first, second = (read_jsonl(folder / "metrics.jsonl") for folder in (run_dir, alone))
    assert [line["step"] for line in first] == [line["step"] for line in second] == [0, 1, 2]
    for one, other in zip(first[1:], second[1:], strict=True):
        for key in COMPARED:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key


def cut_and_go_on(
    hosts: list[Host],
    config: Path,
    run_dir: Path,
    cluster: tuple[str, ...],
    phase: str,
    host: Host,
) -> dict[str, object]:
    """Cut a cable in a phase of the second step of a launch, see the run end, and resume it."""
    before = latest_step(run_dir)
    run = ClusterRun(hosts[:2], config, run_dir, *cluster, "loop.num_steps=1000")
    run.wait_until(lambda: latest_step(run_dir) > before)
    if phase != "rollout":
        scored = num_scored(run_dir)
        run.wait_until(lambda: num_scored(run_dir) >= scored + 4 * 8)
    host.cut_cable()
    begin = time.monotonic()
    codes = run.wait(2 * TIMEOUT_SECONDS + REQUEST_SECONDS)
    seconds = time.monotonic() - begin
    left = run.left()
    host.join_cable()
    output = run.output
    assert all(codes), output
    assert left == [], output
    lines = re.findall(r"(?m)^(?:EngineError|SyncError|rank \d+ on|rank \d+:).*", output)
    assert lines, output
    assert 'train.py", line' not in output, output
    after = latest_step(run_dir)
    resumed = ClusterRun(hosts[:2], config, run_dir, *cluster, f"loop.num_steps={after + 1}")
    assert resumed.wait() == [0, 0], resumed.output
    assert latest_step(run_dir) == after + 1
    return {"seconds": round(seconds, 1), "told": lines[0]}
