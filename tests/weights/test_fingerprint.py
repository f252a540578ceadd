"""Which changes of a checkpoint its fingerprint sees."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.errors import DataError
from megatron_rl.weights import fingerprint
from megatron_rl.weights.fingerprint import model_fingerprint


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


@pytest.fixture(params=["whole", "blocks"])
def hashing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of weights is hashed whole, or, as a large one is, by blocks."""
    if request.param == "blocks":
        monkeypatch.setattr(fingerprint, "NUM_BLOCKS", 16)
        monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 512)


def change_weights(model: Path, change) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    save_file({name: change(tensor) for name, tensor in tensors.items()}, path)


def test_a_copy_elsewhere_is_the_same(hashing: None, model: Path, tiny_checkpoint: Path) -> None:
    (model / "notes.md").write_text("not read by any run")
    found = model_fingerprint(model)
    assert found == model_fingerprint(tiny_checkpoint)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= found.keys()


def test_other_weights(hashing: None, model: Path) -> None:
    before = model_fingerprint(model)
    for change in (
        torch.zeros_like,
        lambda tensor: tensor + 1e-3,
        lambda tensor: tensor.to(torch.bfloat16),
        lambda tensor: tensor.clone()[:-1],
    ):
        change_weights(model, change)
        after = model_fingerprint(model)
        assert [name for name in after if after[name] != before[name]] == ["model.safetensors"]
        before = after


def test_every_place_of_a_large_file_is_near_a_block(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "NUM_BLOCKS", 16)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 512)
    path = model / "model.safetensors"
    content, before = path.read_bytes(), model_fingerprint(model)
    length = len(content) // 15 + 512  # from one block to the end of the next
    for start in range(0, len(content) - length, 5000):
        piece = bytes(255 - value for value in content[start : start + length])
        path.write_bytes(content[:start] + piece + content[start + length :])
        assert model_fingerprint(model) != before
    path.write_bytes(content[:-1] + b"x")
    assert model_fingerprint(model) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_small_files_whole(name: str, model: Path) -> None:
    before = model_fingerprint(model)
    (model / name).write_text((model / name).read_text() + " ")
    (model / "chat_template.jinja").write_text("new")
    after = model_fingerprint(model)
    assert {each for each in after if after[each] != before.get(each)} == {
        name,
        "chat_template.jinja",
    }


def test_a_file_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere: expected a readable file, got No such file"):
        model_fingerprint(model / "nowhere")
