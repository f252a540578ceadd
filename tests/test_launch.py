"""launch/torchrun.sh as a user calls it, from a shell that knows nothing of the environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.ranks import ROOT


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="the environment is not in .venv here")
def test_torchrun_is_found_in_the_repository_s_environment(tmp_path: Path) -> None:
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    finished = subprocess.run(
        [ROOT / "launch" / "torchrun.sh", "megatron_rl.train", "nowhere.yaml"],
        cwd=tmp_path,
        env=kept | {"PATH": "/usr/bin:/bin", "NPROC": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 1
    assert "nowhere.yaml: expected a readable YAML file" in finished.stderr
