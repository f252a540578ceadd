"""What the tool refuses; tests/e2e/test_parity.py compares what it writes with what runs write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.ranks import run_module


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (None, "expected a whole run_state.json, got: FileNotFoundError"),
        ({"run": {"step": 3}}, "expected a checkpoint that says which model it is of"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_one_line(
    state: dict | None, expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    if state is not None:
        (folder / "run_state.json").write_text(json.dumps(state))
    ended = run_module("tools.hf_checkpoint", folder, ranks=0, must_succeed=False)
    assert ended.returncode == 1
    assert len(ended.stdout.splitlines()) == 1 and expected in ended.stdout
    (tmp_path / "huggingface_steps" / "step_000003").mkdir(parents=True)
    again = run_module("tools.hf_checkpoint", folder, ranks=0, must_succeed=False)
    assert "expected a folder that does not exist" in again.stdout
