"""Whose settings the tool takes; tests/weights/conversion/ compares what it writes, and
tests/e2e/test_parity.py compares it with what runs write.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.learner.model.checkpoint_sums import file_sum, sums_text
from tests.support.hub import empty_cache, fetched_model
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


def test_names_of_models_in_the_hub_s_cache(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = empty_cache(tmp_path, monkeypatch)
    snapshot = fetched_model(hub, "mine/tiny", tiny_checkpoint)
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / ".metadata").write_text("of no checkpoint")
    options = convert_checkpoint._parser().parse_args(["mine/tiny", "-o", "out"])
    request = convert_checkpoint._request(options)
    assert (request.source, request.model) == (snapshot, snapshot)
    arguments = [str(tmp_path / "megatron"), "-o", "out", "--model", "mine/tiny"]
    request = convert_checkpoint._request(convert_checkpoint._parser().parse_args(arguments))
    assert (request.is_megatron, request.model) == (True, snapshot)
    assert convert_checkpoint.main(["mine/other", "-o", "out"]) == 1
    [told] = capsys.readouterr().err.splitlines()
    assert f"in the hub's cache {hub}" in told and "hf download mine/other" in told


def test_a_checkpoint_with_a_damaged_file_is_not_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    (folder / "run_state.json").write_text("{}")
    (folder / "__0_0.distcp").write_bytes(b"whole")
    sums = {name: file_sum(folder / name) for name in ("run_state.json", "__0_0.distcp")}
    (folder / "SHA256SUMS").write_text(sums_text(sums))
    (folder / "__0_0.distcp").write_bytes(b"whale")
    assert convert_checkpoint.main([str(folder)]) == 1
    [told] = capsys.readouterr().err.splitlines()
    assert f"checkpoint {folder}: " in told and "got: __0_0.distcp is damaged" in told


@pytest.mark.parametrize(
    ("source", "more", "expected"),
    [
        ("megatron", (), "expected a Hugging Face checkpoint, to Megatron and without --verify"),
        ("tiny", ("--verify",), "expected a Hugging Face checkpoint, to Megatron and without"),
        ("tiny", (), "expected a family that this package does not convert itself, got qwen3"),
    ],
)
def test_what_does_not_go_through_mcore_bridge(
    source: str,
    more: tuple[str, ...],
    expected: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / ".metadata").write_text("of no checkpoint")
    folder = str(tiny_checkpoint if source == "tiny" else tmp_path / "megatron")
    arguments = [folder, "-o", str(tmp_path / "out"), "--model", str(tiny_checkpoint)]
    assert convert_checkpoint.main([*arguments, "--through", "mcore-bridge", *more]) == 1
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("convert_checkpoint: --through mcore-bridge: ") and expected in told
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
