"""Other families, through mcore-bridge: its absence, and its tensors where it is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.learner.model.bridged import PACKAGES, check_bridge
from tests.support.ranks import ROOT
from tests.support.transformer_engine import packages

MISSING = importlib.util.find_spec(PACKAGES[0]) is None


@pytest.mark.parametrize("is_there", [(), ("mcore_bridge",), ("transformer_engine",)])
def test_a_missing_package_is_named(
    is_there: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict.fromkeys(is_there, "a module")
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    missing = ", ".join(name for name in PACKAGES if name not in is_there)
    with pytest.raises(ConfigError, match=f"--through mcore-bridge: .*, got no {missing}; install"):
        check_bridge("olmoe")


def test_a_family_that_is_converted_here_is_refused() -> None:
    with pytest.raises(ConfigError, match="not convert itself, got qwen3; leave out --through"):
        check_bridge("qwen3")


@pytest.mark.slow
@pytest.mark.skipif(MISSING, reason="mcore-bridge is not installed (docs/cluster.md)")
def test_known_families_come_out_as_from_our_own_conversion(tmp_path: Path) -> None:
    """Every byte, dense and mixture; and a family that only mcore-bridge knows is written by the
    tool. In a process of its own, since mcore-bridge patches transformers, and with a stand-in for
    Transformer Engine's compiled part.
    """
    finished = subprocess.run(
        [sys.executable, "-m", "tests.learner.support.bridged", str(packages()), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    told = finished.stdout.splitlines()
    assert [line for line in told if line.startswith("equal")] == [
        "equal untied",
        "equal tied",
        "equal biased",
        "equal moe",
        "equal bfloat16",
    ]
    assert told[-2:] == [f"{tmp_path}/olmoe_megatron", "exit codes 0 1"]
    assert (
        "convert_checkpoint: --through mcore-bridge: expected a family that it knows, got gpt2"
        in (finished.stderr.splitlines())
    )
    assert (tmp_path / "olmoe_megatron" / ".metadata").is_file()
