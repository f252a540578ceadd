"""Whose settings the tool takes; tests/weights/conversion/ compares what it writes, and
tests/e2e/test_parity.py compares it with what runs write.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import convert_checkpoint


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, "expected a whole run_state.json, got: KeyError"),
        ({"run": {"step": 3}}, "expected a checkpoint that says which model it is of"),
    ],
)
def test_a_run_that_does_not_say_its_model(
    state: dict, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    (folder / "run_state.json").write_text(json.dumps(state))
    assert convert_checkpoint.main([str(folder)]) == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and expected in told
    assert convert_checkpoint.main([str(folder), "--to", "megatron"]) == 1
    assert convert_checkpoint.main([str(tmp_path)]) == 1
    assert "expected a checkpoint, with config.json" in capsys.readouterr().err.splitlines()[-1]
