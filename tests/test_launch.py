"""launch/torchrun.sh as a user calls it, from a shell that knows nothing of the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.ranks import ROOT


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="the environment is not in .venv here")
def test_torchrun_is_found_in_the_repository_s_environment(tmp_path: Path) -> None:
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    finished = subprocess.run(
        [ROOT / "launch" / "torchrun.sh", "megatron_rl.train", "nowhere.yaml"],
        cwd=tmp_path,
        env=kept | {"PATH": "/usr/bin:/bin", "NPROC": "2", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 1
    [line] = finished.stderr.splitlines()  # of one rank, and without torchrun's own report
    assert "nowhere.yaml: expected a readable YAML file" in line
    assert list(tmp_path.iterdir()) == []  # no folder of error files is left


@pytest.mark.parametrize(
    ("blocked", "package"), [("megatron", "megatron-core"), ("torch", "torch")]
)
def test_a_missing_package_is_one_line(blocked: str, package: str, tmp_path: Path) -> None:
    """Before ranks are started; nothing of the learner is imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {blocked!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    bin_folder = Path(sys.executable).parent
    begin = time.monotonic()
    finished = subprocess.run(
        [ROOT / "launch" / "torchrun.sh", "megatron_rl.train", "nowhere.yaml"],
        env=os.environ
        | {
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "NPROC": "2",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 1 and time.monotonic() - begin < 60
    [line] = finished.stderr.splitlines()
    assert line.startswith(f"ConfigError: learner: expected the packages {package} in ")
    assert "requirements/cpu.txt" in line


def test_a_missing_torchrun_is_told(tmp_path: Path) -> None:
    launch = tmp_path / "launch"
    launch.mkdir()
    script = launch / "torchrun.sh"
    script.write_bytes((ROOT / "launch" / "torchrun.sh").read_bytes())
    finished = subprocess.run(
        ["bash", script, "megatron_rl.train", "nowhere.yaml"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("torchrun.sh: expected torchrun on the PATH or in .venv")
    assert len(finished.stderr.splitlines()) == 1


@pytest.mark.parametrize("num_ranks", ["two", "0", "1.5"])
def test_a_wrong_number_of_ranks_is_one_line(num_ranks: str, tmp_path: Path) -> None:
    """Before torch is imported: the interpreter beside this torchrun does nothing."""
    for name in ("torchrun", "python"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    finished = subprocess.run(
        [ROOT / "launch" / "torchrun.sh", "megatron_rl.train", "nowhere.yaml"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "NPROC": num_ranks},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2
    [line] = finished.stderr.splitlines()
    assert line.endswith(f"NPROC: expected a number of ranks, such as NPROC=2, got '{num_ranks}'")
