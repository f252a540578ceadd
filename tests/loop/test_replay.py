"""A run from recorded rollouts, through the command line and without any engine: the same rollouts
give the same bits, also when the run is killed on the way and goes on; and what stops such a run is
told.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.learner.recorded import NUM_PROMPTS, NUM_SAMPLES, NUM_STEPS
from tests.support.checkpoint_reader import read_tensors
from tests.support.ranks import ROOT, rank_environment, run_module, torchrun_command

START_SECONDS = 120.0
LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "dp2": ["parallel.tensor=1"],
    # Killed while the tolerance is being measured, or in the warm-up of the dual step after it.
    "measured tolerance": [
        "objective.preset=dc_grpo_tis",
        "objective.constraint.tolerance=auto",
        "objective.constraint.tolerance_steps=5",
        "objective.constraint.warmup_steps=3",
        "objective.importance.batch_normalize=true",
    ],
}


@pytest.fixture(scope="module")
def config(
    tiny_checkpoint: Path, recorded_rollouts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A replay of all recorded steps, with a checkpoint after every second one."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "prompts.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    settings = {
        "model": {"path": str(tiny_checkpoint)},
        "replay": str(recorded_rollouts),
        "data": {
            "tasks": [{"path": str(folder / "prompts.jsonl"), "verifier": "exact"}],
            "num_held_out": 0,
        },
        "rollout": {"sampling": {"max_tokens": 32}},
        "learner": {
            "tokens_per_micro_batch": 256,
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "decay": "linear"},
        },
        "loop": {
            "num_steps": NUM_STEPS,
            "prompts_per_step": NUM_PROMPTS,
            "samples_per_prompt": NUM_SAMPLES,
        },
        "checkpoint": {"every": 2, "keep": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def read_run_state(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run_state.json").read_text())


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics, without what a clock gave."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith("speed/") and "time" not in key and "second" not in key
        }
        for line in lines
    ]


def kill_halfway(arguments: list[str], run_dir: Path, *, with_torchrun: bool) -> int:
    """Start a run, SIGKILL its ranks once there is a checkpoint; the step that it was of.

    Args:
        with_torchrun: the real one is started and killed, and the ranks die with it.
    """
    latest = run_dir / "checkpoints" / "latest"
    if with_torchrun:
        kill_torchrun_when(latest, arguments, run_dir)
    else:
        finished = run_module(
            "megatron_rl.train", *arguments, ranks=2, must_succeed=False, kill_when=latest
        )
        assert finished.codes == (-signal.SIGKILL, -signal.SIGKILL), finished.stdout
    return int(latest.read_text().strip().removeprefix("step_"))


def kill_torchrun_when(path: Path, arguments: list[str], run_dir: Path) -> None:
    """Start torchrun, and kill it as soon as the path exists."""
    with (run_dir.parent / f"{run_dir.name}.log").open("w") as log:
        process = subprocess.Popen(
            torchrun_command("megatron_rl.train", *arguments, ranks=2),
            cwd=ROOT,
            env=rank_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + START_SECONDS
    while not path.is_file():
        assert process.poll() is None, log.name
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the ranks die with torchrun


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_same_rollouts_give_the_same_bits_also_after_a_kill(
    layout: str, config: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [str(config), *LAYOUTS[layout]]
    run_module("megatron_rl.train", *arguments, f"run_dir={whole}", ranks=2)
    step = kill_halfway([*arguments, f"run_dir={killed}"], killed, with_torchrun=layout == "tp2")
    assert 2 <= step < NUM_STEPS
    resumed = run_module("megatron_rl.train", *arguments, f"run_dir={killed}", ranks=2)
    assert "vllm" not in resumed.stdout.lower()
    assert f"resumed after step {step}, at prompt " in resumed.stdout
    last = f"checkpoints/step_{NUM_STEPS:06d}"
    expected, got = read_tensors(whole / last), read_tensors(killed / last)
    assert sum("exp_avg_sq" in name for name in expected) >= 10
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert read_run_state(killed / last)["run"] == read_run_state(whole / last)["run"]
    assert read_run_state(killed / last)["scheduler"] == read_run_state(whole / last)["scheduler"]
    weights = "huggingface/model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert metrics_of(killed) == metrics_of(whole)
    assert [line["step"] for line in metrics_of(whole)] == list(range(NUM_STEPS + 1))
    assert not (whole / "rollouts").exists()  # what was recorded is not recorded again


def test_a_run_that_is_asked_to_stop_saves_first_and_goes_on(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (config, f"run_dir={run_dir}", "checkpoint.every=0")
    (run_dir).mkdir()
    (run_dir / "stop").touch()  # from before this start: no request

    def ask() -> None:
        while not (run_dir / "metrics.jsonl").is_file():
            time.sleep(0.002)
        (run_dir / "stop").touch()

    asking = threading.Thread(target=ask)
    asking.start()
    told = run_module("megatron_rl.train", *arguments, ranks=2).stdout
    asking.join()
    step = int(re.search(r"stopped after step (\d+), as it was asked to", told)[1])
    assert 1 <= step < NUM_STEPS
    latest = run_dir / "checkpoints" / "latest"
    assert latest.read_text().strip() == f"step_{step:06d}"
    assert not (run_dir / "stop").exists() and not (run_dir / "huggingface").exists()
    resumed = run_module("megatron_rl.train", *arguments, ranks=2).stdout
    assert f"resumed after step {step}, at prompt {step * NUM_PROMPTS}" in resumed
    assert [line["step"] for line in metrics_of(run_dir)] == list(range(NUM_STEPS + 1))
    assert (run_dir / "huggingface" / "model.safetensors").is_file()


def test_a_replay_needs_the_same_batch(config: Path, tmp_path: Path) -> None:
    finished = run_module(
        "megatron_rl.train",
        config,
        f"run_dir={tmp_path / 'run'}",
        "loop.prompts_per_step=2",
        ranks=1,
        must_succeed=False,
    )
    assert finished.returncode != 0
    assert "DataError" in finished.stdout
    assert "loop.prompts_per_step" in finished.stdout
    assert "Traceback" not in finished.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint of the tiny model and not for two."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_keeps_the_old_checkpoint(
    config: Path, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    finished = run_module(
        "megatron_rl.train", config, f"run_dir={run_dir}", ranks=2, must_succeed=False
    )
    assert finished.returncode != 0
    assert "DataError: checkpoint of step 4" in finished.stdout
    assert (run_dir / "checkpoints/latest").read_text().strip() == "step_000002"
    assert read_run_state(run_dir / "checkpoints/step_000002")["run"]["step"] == 2
    assert len(read_tensors(run_dir / "checkpoints/step_000002")) > 20


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = (config, f"run_dir={run_dir}")
    told = run_module("megatron_rl.train", *arguments, "loop.num_steps=4", ranks=1).stdout
    assert len(re.findall(r"checkpoint of step \d: .* the step was held for ", told)) == 1
    damaged = run_dir / "checkpoints/step_000004"
    shard = sorted(damaged.glob("*.distcp"))[-1]
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 1
    shard.write_bytes(contents)
    named = run_module(
        "megatron_rl.train", *arguments, f"resume={damaged}", ranks=2, must_succeed=False
    )
    assert named.returncode != 0
    errors = [line for line in named.stdout.splitlines() if line.startswith("DataError:")]
    assert len(errors) == 1  # by the first rank that meets it, and not by every rank
    assert f"checkpoint {damaged}: {shard.name} is damaged (its SHA-256 is " in errors[0]
    resumed = run_module("megatron_rl.train", *arguments, ranks=2).stdout
    lines = [line for line in resumed.splitlines() if " is damaged (" in line]
    assert len(lines) == 1
    assert f"checkpoint {damaged}: {shard.name} is damaged" in lines[0]
    assert lines[0].endswith("going back to step_000002")
    assert "are as they were written (SHA-256, " in resumed
    assert "resumed after step 2, at prompt " in resumed
    assert [line["step"] for line in metrics_of(run_dir)] == list(range(NUM_STEPS + 1))
