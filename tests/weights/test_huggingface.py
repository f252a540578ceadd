"""Checkpoint folders: written and read back, and every way in which one can be broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_rl.errors import DataError
from megatron_rl.weights.huggingface import INDEX_NAME, CheckpointReader, write_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 as transformers writes it, with a tokenizer's file and an index of another format."""
    folder = tmp_path_factory.mktemp("original")
    config = Qwen3Config(
        vocab_size=131,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def tensors(original: Path) -> Tensors:
    return everything(original)


def everything(folder: Path) -> Tensors:
    reader = CheckpointReader(folder)
    return {name: reader.read(name, None, 0, 0) for name in reader.names}


def write_sharded(folder: Path, tensors: Tensors, original: Path) -> list[Path]:
    write_checkpoint(folder, tensors.items(), like=original, max_shard_bytes=8_000)
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(2**30, 1), (20_000, 6), (1, 25)])
def test_what_was_written_is_read_back(
    tmp_path: Path, original: Path, tensors: Tensors, max_shard_bytes: int, num_files: int
) -> None:
    folder = tmp_path / "deep" / "copy"
    write_checkpoint(folder, tensors.items(), like=original, max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) == num_files, files
    assert (folder / INDEX_NAME).exists() == (num_files > 1)
    again = everything(folder)
    assert list(again) == list(tensors) if num_files > 1 else again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, tensors[name]), f"{name} as transformers loads it"


def test_small_files_come_along_and_the_dtype_is_told(
    tmp_path: Path, original: Path, tensors: Tensors
) -> None:
    narrow = ((name, tensor.bfloat16()) for name, tensor in tensors.items())
    write_checkpoint(tmp_path / "copy", narrow, like=original)
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "copy" / "pytorch_model.bin.index.json").exists()
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["hidden_size"] == 32


def test_a_chat_template_takes_the_place_of_the_original(
    tmp_path: Path, original: Path, tensors: Tensors
) -> None:
    (original / "chat_template.jinja").write_text("old")
    for template, expected in (("", "old"), ("new", "new")):
        folder = tmp_path / f"copy-{expected}"
        write_checkpoint(folder, tensors.items(), like=original, chat_template=template)
        assert (folder / "chat_template.jinja").read_text() == expected


def test_slices(original: Path, tensors: Tensors) -> None:
    reader = CheckpointReader(original)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert reader.shape(name) == (32, 32)
    assert torch.equal(reader.read(name, 0, 3, 9), tensors[name][3:9])
    assert torch.equal(reader.read(name, 1, 3, 9), tensors[name][:, 3:9])


def test_a_folder_is_replaced_whole(tmp_path: Path, original: Path, tensors: Tensors) -> None:
    folder = tmp_path / "copy"
    write_sharded(folder, tensors, original)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    write_checkpoint(folder, changed.items(), like=folder)  # its own config comes along
    assert not (folder / INDEX_NAME).exists(), "shards of the replaced checkpoint"
    again = everything(folder)
    assert all(torch.equal(again[name], changed[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, original: Path, tensors: Tensors
) -> None:
    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tensors.items())[:5]
        raise RuntimeError("a rank died")

    folder = tmp_path / "copy"
    with pytest.raises(RuntimeError, match="a rank died"):
        write_checkpoint(folder, breaking(), like=original, max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []
    write_sharded(folder, tensors, original)
    with pytest.raises(RuntimeError, match="a rank died"):
        write_checkpoint(folder, breaking(), like=original, max_shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    again = everything(folder)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_shard(tmp_path: Path, original: Path, tensors: Tensors, kept: float) -> None:
    shard = write_sharded(tmp_path / "copy", tensors, original)[2]
    content = shard.read_bytes()
    shard.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    reader = CheckpointReader(tmp_path / "copy")
    expected = f"{shard.name}: expected a whole safetensors file, got: "
    with pytest.raises(DataError, match=expected):
        reader.check_whole()
    name = next(name for name in reader.names if name_is_in(shard, name))
    with pytest.raises(DataError, match=expected):
        reader.read(name, None, 0, 0)
    with pytest.raises(DataError, match=expected):
        reader.shape(name)


def name_is_in(shard: Path, name: str) -> bool:
    index = json.loads((shard.parent / INDEX_NAME).read_text())
    return index["weight_map"][name] == shard.name


def test_a_truncated_single_file(tmp_path: Path, original: Path, tensors: Tensors) -> None:
    write_checkpoint(tmp_path / "copy", tensors.items(), like=original)
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"model\.safetensors: expected a whole safetensors file"):
        CheckpointReader(tmp_path / "copy")


def test_a_missing_shard(tmp_path: Path, original: Path, tensors: Tensors) -> None:
    shard = write_sharded(tmp_path / "copy", tensors, original)[-1]
    shard.unlink()
    reader = CheckpointReader(tmp_path / "copy")
    with pytest.raises(DataError, match=f"{shard.name}: expected a shard that the .* index names"):
        reader.check_whole()


def test_a_shard_that_holds_something_else(
    tmp_path: Path, original: Path, tensors: Tensors
) -> None:
    first, second = write_sharded(tmp_path / "copy", tensors, original)[:2]
    name = next(name for name in tensors if name_is_in(first, name))
    first.write_bytes(second.read_bytes())
    reader = CheckpointReader(tmp_path / "copy")
    for read in (reader.shape, lambda name: reader.read(name, None, 0, 0)):
        with pytest.raises(DataError, match=f"{first.name}: expected to hold {name} as the index"):
            read(name)


def test_a_name_that_is_not_there(original: Path) -> None:
    reader = CheckpointReader(original)
    for read in (reader.shape, lambda name: reader.read(name, None, 0, 0)):
        with pytest.raises(DataError, match=r"expected a tensor named lm_head\.bias, got none"):
            read("lm_head.bias")


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/hostname", "a/b.safetensors", "..", 3])
def test_an_index_that_points_elsewhere(
    tmp_path: Path, original: Path, tensors: Tensors, file: object
) -> None:
    write_sharded(tmp_path / "copy", tensors, original)
    (tmp_path / "x.safetensors").write_bytes((original / "model.safetensors").read_bytes())
    index = {"weight_map": dict.fromkeys(tensors, file)}
    (tmp_path / "copy" / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"expected names of files in the same folder|no such file"):
        CheckpointReader(tmp_path / "copy").check_whole()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"weight_map": [1]}', b"\xff\xfe"])
def test_a_malformed_index(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json: expected JSON with a weight_map"):
        CheckpointReader(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected model\.safetensors or .*, got neither"):
        CheckpointReader(tmp_path)
