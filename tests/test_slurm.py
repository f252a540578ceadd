"""launch/slurm.sbatch under a real SLURM of two nodes on this machine.

A run with learners on one node and engines on the other is requeued and goes on, is stopped by the
signal that SLURM sends before the time limit after it has saved, and ends well. A job with learners
and an engine on both nodes, and a heterogeneous one, are cancelled and leave no process.
docs/cluster.md has the last result.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.runs import read_jsonl
from tests.support.ranks import ROOT

CLUSTER = ROOT / "tests" / "support" / "slurm_two_nodes.sh"
MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name)]
START_SECONDS, STEP_SECONDS, LEFT_SECONDS = 400.0, 120.0, 15.0
SIGNAL_SECONDS = 150.0  # SLURM compares times with limits twice a minute
SIGNAL_MINUTES = 5  # before the limit, as `--signal` of the script says
ENDLESS = 100_000  # steps
ONE = ("--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1")
TWO = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of SLURM are started as root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which the commands of SLURM reach the two nodes."""
    root = tmp_path_factory.mktemp("slurm")
    environment = os.environ | {"SLURM_ROOT": str(root), "PROCTRACK": "proctrack/linuxproc"}
    subprocess.run([CLUSTER, "start"], env=environment, check=True, timeout=60)
    yield environment | {"SLURM_CONF": str(root / "slurm.conf"), "PYTHONPATH": str(ROOT)}
    subprocess.run([CLUSTER, "stop"], env=environment, check=True, timeout=60)


def write_small(write_config: Callable[..., Path], folder: Path, num_steps: int) -> Path:
    return write_config(
        folder,
        parallel={"tensor": 2},
        rollout={
            "dtype": "float32",
            "num_threads": 1,
            "kv_cache_gib": 0.1,
            "max_num_seqs": 16,
            "sampling": {"max_tokens": 16},
        },
        checkpoint={"every": 3, "save_hf": True},
        loop={"num_steps": num_steps, "prompts_per_step": 4, "samples_per_prompt": 4},
    )


def submit(
    cluster: dict[str, str], config: Path, run_dir: Path, *nodes: str, **variables: str
) -> str:
    """Submit a run; returns the job's number.

    Args:
        nodes: options of sbatch.
        variables: of the environment.
    """
    log = f"--output={run_dir.parent}/job.log"
    submitted = subprocess.run(
        [
            *("sbatch", "--parsable", "--time=30", log, *nodes, "launch/slurm.sbatch"),
            *(str(config), f"run_dir={run_dir}"),
        ],
        cwd=ROOT,
        env=cluster | variables,
        check=True,
        capture_output=True,
        text=True,
    )
    return submitted.stdout.strip()


def wait_until(is_so: Callable[[], object], seconds: float, run_dir: Path) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        text = printed(run_dir)
        assert time.monotonic() < deadline and "FAILED" not in text, text[-4000:]
        time.sleep(0.1)


def printed(run_dir: Path) -> str:
    """What the job, its learners and its engines printed."""
    logs = [run_dir.parent / "job.log", *sorted((run_dir / "logs").glob("job_*/*.log"))]
    return "".join(path.read_text(errors="replace") for path in logs if path.is_file())


def latest(run_dir: Path) -> int:
    pointer = run_dir / "checkpoints" / "latest"
    return int(pointer.read_text().strip().removeprefix("step_")) if pointer.is_file() else 0


def left_of(run_dir: Path) -> list[str]:
    """The command lines of processes that name the run's folder, or got it from one that did."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (process / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(run_dir) in command or f"LOG_DIR={run_dir}" in environment:
            found.append(command)
    return found


def command(cluster: dict[str, str], *arguments: str) -> str:
    finished = subprocess.run(arguments, env=cluster, check=True, capture_output=True, text=True)
    return finished.stdout


def resumed_steps(run_dir: Path) -> list[int]:
    return [int(step) for step in re.findall(r"resumed after step (\d+)", printed(run_dir))]


def set_limit(cluster: dict[str, str], job: str, minutes: int) -> None:
    """The time limit from the start of the job, which SLURM refuses to change while it ends."""
    update = ["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"]
    deadline = time.monotonic() + STEP_SECONDS
    while (done := subprocess.run(update, env=cluster, capture_output=True)).returncode:
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.5)


def minutes_run(cluster: dict[str, str], job: str) -> int:
    """Whole minutes, rounded up, that the job has run since its last start."""
    hours, minutes, seconds = map(
        int,
        re.search(
            r"RunTime=(\d+):(\d+):(\d+)", command(cluster, "scontrol", "show", "job", job)
        ).groups(),
    )
    return 60 * hours + minutes + (seconds > 0)


def test_requeued_stopped_before_the_limit_and_finished(
    cluster: dict[str, str], tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    config, run_dir = write_small(write_config, tmp_path, ENDLESS), tmp_path / "run"
    job = submit(cluster, config, run_dir, *TWO, ENGINE_NODES="1", NPROC="2")
    wait_until(lambda: latest(run_dir) >= 3, START_SECONDS, run_dir)
    assert re.search(r"job \d+, start 0: learners on nodeA, engines on nodeB", printed(run_dir))
    command(cluster, "scontrol", "requeue", job)
    wait_until(lambda: resumed_steps(run_dir), START_SECONDS, run_dir)
    begin = resumed_steps(run_dir)[0]
    assert begin >= 3 and begin % 3 == 0
    wait_until(lambda: latest(run_dir) > begin, STEP_SECONDS, run_dir)
    set_limit(cluster, job, minutes_run(cluster, job) + SIGNAL_MINUTES)
    told = r"stopped after step (\d+), as it was asked to"
    wait_until(lambda: re.search(told, printed(run_dir)), SIGNAL_SECONDS, run_dir)
    assert "time limit: the run saves after its step" in printed(run_dir)
    stopped = int(re.search(told, printed(run_dir))[1])
    assert latest(run_dir) == stopped
    write_small(write_config, tmp_path, stopped + 2)  # which the next start reads
    set_limit(cluster, job, 30)
    wait_until(lambda: len(resumed_steps(run_dir)) == 2, START_SECONDS, run_dir)
    assert resumed_steps(run_dir)[1] == stopped
    wait_until(lambda: not command(cluster, "squeue", "--noheader"), START_SECONDS, run_dir)
    assert "JobState=COMPLETED" in command(cluster, "scontrol", "show", "job", job)
    steps = [line["step"] for line in read_jsonl(run_dir / "metrics.jsonl")]
    assert steps == list(range(stopped + 3))
    assert (run_dir / "huggingface" / "model.safetensors").is_file()
    assert not left_of(run_dir)
    ranks = list((run_dir / "logs" / f"job_{job}").glob("ranks_of_node_0/*/attempt_0/*/*.log"))
    assert len(ranks) == 2 * 2 * 3  # ranks, streams, starts


@pytest.mark.parametrize(
    ("nodes", "num_ranks", "engines"),
    [
        (TWO, 1, "the same"),
        ((*ONE, ":", *ONE), 2, "nodeB"),
    ],
    ids=["same nodes", "heterogeneous"],
)
def test_a_cancelled_job_leaves_no_process(
    nodes: tuple[str, ...],
    num_ranks: int,
    engines: str,
    cluster: dict[str, str],
    tmp_path: Path,
    write_config: Callable[..., Path],
) -> None:
    config, run_dir = write_small(write_config, tmp_path, ENDLESS), tmp_path / "run"
    job = submit(cluster, config, run_dir, *nodes, NPROC=str(num_ranks))
    wait_until(lambda: latest(run_dir) >= 3, START_SECONDS, run_dir)
    learners = "nodeA nodeB" if num_ranks == 1 else "nodeA"
    assert f"learners on {learners}, engines on {engines};" in printed(run_dir)
    assert len(left_of(run_dir)) >= 6  # script, agents, ranks, guard, engine
    command(cluster, "scancel", job)
    wait_until(lambda: not left_of(run_dir), LEFT_SECONDS, run_dir)
    wait_until(lambda: not command(cluster, "squeue", "--noheader"), STEP_SECONDS, run_dir)
