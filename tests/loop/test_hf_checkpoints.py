"""Hugging Face checkpoints of a run: where they are written, what a resumed run forgets, and what
is said of a disk that is full.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config import Config, ModelConfig
from megatron_rl.errors import DataError
from megatron_rl.loop import record
from megatron_rl.loop.hf_checkpoints import forget_later_hf
from megatron_rl.loop.record import save_hf_checkpoint
from tests.fakes.learner import FakeLearner, FakeParallel


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> Config:
    return Config(run_dir=str(tmp_path), model=ModelConfig(path=str(tiny_checkpoint)))


def test_the_weights_of_a_step_and_the_final_ones(config: Config, tmp_path: Path) -> None:
    learner = FakeLearner()
    save_hf_checkpoint(learner, config, step=50)
    assert save_hf_checkpoint(learner, config) == Path(config.run_dir) / "huggingface"
    for folder in ("huggingface_steps/step_000050", "huggingface"):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        assert torch.equal(tensors["model.norm.weight"], torch.arange(4.0))
        assert (tmp_path / folder / "tokenizer.json").is_file()
    assert learner.log == ["full_tensors"] * 2
    assert learner.parallel.log == ["barrier"] * 2


def test_other_ranks_contribute_their_shards(config: Config, tmp_path: Path) -> None:
    learner = FakeLearner(parallel=FakeParallel(rank=1))
    save_hf_checkpoint(learner, config, step=50)
    assert (learner.log, learner.parallel.log) == (["give_tensors"], ["barrier"])
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_forgets_later_steps_and_what_a_kill_left(tmp_path: Path) -> None:
    for name in (
        "huggingface",
        ".huggingface.partial.17",
        "huggingface_steps/step_000010",
        "huggingface_steps/step_000020",
        "huggingface_steps/step_000030",
        "huggingface_steps/.step_000020.partial.17",
    ):
        (tmp_path / name).mkdir(parents=True)
    forget_later_hf(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huggingface", "huggingface_steps"]
    left = sorted(path.name for path in (tmp_path / "huggingface_steps").iterdir())
    assert left == ["step_000010", "step_000020"]
    forget_later_hf(tmp_path / "new", 0)


def test_a_full_disk_is_told_in_one_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*positional: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_checkpoint", full)
    with pytest.raises(DataError, match=r"step_000050: expected to write .* No space .* untouched"):
        save_hf_checkpoint(FakeLearner(), replace(config), step=50)
