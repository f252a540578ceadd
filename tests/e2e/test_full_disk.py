"""A disk that becomes full while a run trains: one line, and the run goes on after the last
checkpoint when there is space again. On a file system of a few megabytes, if this user may mount
one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.ranks import run_module
from tests.support.served_engine import ServedEngine

DISK_KIB = 6144  # takes two checkpoints of the model
LEFT_KIB = 192  # for some steps, not for a checkpoint


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_becomes_full(
    tmp_path: Path, disk: Path, write_config: Callable[..., Path], served_engine: ServedEngine
) -> None:
    run_dir, filler = disk / "run", disk / "of another user"
    config = write_config(
        tmp_path,
        rollout={"sampling": {"max_tokens": 100}},
        checkpoint={"every": 2, "keep": 1, "save_hf": False},
    )
    train_to_the_end(config, "loop.num_steps=2", num_ranks=0, run_dir=run_dir, engine=served_engine)
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    fill(filler, leave_kib=LEFT_KIB)
    finished = run_module(
        "megatron_rl.train",
        config,
        f"run_dir={run_dir}",
        "loop.num_steps=40",
        "checkpoint.every=40",
        *served_engine.overrides(),
        ranks=0,
        must_succeed=False,
        variables=served_engine.variables(),
    )
    assert finished.returncode == 1, finished.stdout
    lines = finished.stdout.splitlines()
    assert "Traceback" not in finished.stdout
    assert lines[-1].endswith("No space left on device; free some space there"), finished.stdout
    assert [line for line in lines if "Error" in line] == lines[-1:]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == kept
    filler.unlink()
    output = train_to_the_end(
        config, "loop.num_steps=4", num_ranks=0, run_dir=run_dir, engine=served_engine
    )
    assert "resumed after step 2" in output
    assert [line["step"] for line in read_jsonl(run_dir / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def fill(path: Path, *, leave_kib: int) -> None:
    """Write a file that leaves so much of the disk."""
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as file:
        while True:
            if file.write(bytes(4096)) < 4096:
                raise OSError("No space left")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - leave_kib * 1024)
