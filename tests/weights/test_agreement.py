"""Checkpoints whose tensors and config contradict each other; each is one that a tool can leave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.errors import DataError
from megatron_rl.weights.agreement import check_checkpoint, model_names
from megatron_rl.weights.geometry import read_geometry
from megatron_rl.weights.huggingface import INDEX_NAME, CheckpointReader, write_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil: untied, two layers."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def change(model: Path, **config: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def tensors_of(model: Path) -> Tensors:
    return load_file(model / "model.safetensors")


def write(model: Path, tensors: Tensors, file: str = "model.safetensors") -> None:
    save_file(tensors, model / file, metadata={"format": "pt"})


def check(model: Path) -> None:
    check_checkpoint(model, read_geometry(model))


def refused(model: Path) -> str:
    with pytest.raises(DataError) as caught:
        check(model)
    message = str(caught.value)
    assert "\n" not in message and str(model) in message
    return message


def test_a_checkpoint_that_agrees(model: Path) -> None:
    check(model)
    reader = CheckpointReader(model)
    tensors = [(name, reader.read(name, None, 0, 0)) for name in reader.names]
    write_checkpoint(model.parent / "sharded", tensors, like=model, max_shard_bytes=20_000)
    check(model.parent / "sharded")


def test_a_tied_model_with_an_equal_head_is_tied(model: Path) -> None:
    """As quantising and fine-tuning tools write it; with the head in another precision too."""
    change(model, tie_word_embeddings=True)
    tensors = tensors_of(model)
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        tensors[HEAD] = tensors[EMBEDDING].to(dtype, copy=True)
        write(model, tensors)
        check(model)
        names = model_names(CheckpointReader(model).names, read_geometry(model))
        assert HEAD not in names and EMBEDDING in names
    del tensors[HEAD]
    write(model, tensors)
    check(model)


def test_a_tied_model_with_another_head_is_refused(model: Path) -> None:
    change(model, tie_word_embeddings=True)
    assert "tie_word_embeddings=true, got a lm_head.weight that differs" in refused(model)
    tensors = tensors_of(model)
    for other in (
        tensors[EMBEDDING] + 1e-6 * torch.eye(128, 64),  # nearly the same
        tensors[EMBEDDING][:-1].clone(),  # of another shape
        tensors[EMBEDDING].bfloat16(),  # rounded: the engine would see two heads
    ):
        write(model, tensors | {HEAD: other})
        assert "set tie_word_embeddings to false" in refused(model)


def test_no_head_and_no_flag(model: Path) -> None:
    tensors = tensors_of(model)
    del tensors[HEAD]
    write(model, tensors)
    assert "expected a tensor lm_head.weight, got none; if the head is the emb" in refused(model)
    change(model, tie_word_embeddings=True)
    check(model)


@pytest.mark.parametrize(
    ("num_layers", "named"),
    [
        (1, "the 1 layers in config.json, got 11 others, the first is model.layers.1."),
        (3, "expected a tensor model.layers.2.input_layernorm.weight of the 3 layers"),
    ],
)
def test_another_number_of_layers(model: Path, num_layers: int, named: str) -> None:
    change(model, num_hidden_layers=num_layers, layer_types=["full_attention"] * num_layers)
    assert named in refused(model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 129}, "model.embed_tokens.weight: expected shape [129, 64]"),
        (
            {"head_dim": 16},
            "q_proj.weight: expected shape [64, 64] from config.json, got",
        ),
        ({"intermediate_size": 96}, "gate_proj.weight: expected shape [96, 64]"),
        (
            {"vocab_size": "128"},
            "expected what transformers accepts, got: Validation error",
        ),
        ({"rms_norm_eps": "small"}, "expected what transformers accepts"),
        ({"dtype": "float99"}, "expected what transformers accepts"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "key 'factor', got none"),
    ],
)
def test_a_config_of_another_model(model: Path, changes: dict[str, Any], named: str) -> None:
    change(model, **changes)
    assert named in refused(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_weights_of_whole_numbers(model: Path, dtype: torch.dtype) -> None:
    """As a quantised checkpoint has them; read as floats they would be another model."""
    tensors = tensors_of(model)
    write(model, tensors | {"model.norm.weight": tensors["model.norm.weight"].to(dtype)})
    assert "model.norm.weight: expected floating-point numbers, got " in refused(model)


def test_a_whole_file_beside_an_older_index(model: Path) -> None:
    old = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(model).items()}
    write(model, old, "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (model / INDEX_NAME).write_text(json.dumps(index))
    assert f"got {INDEX_NAME} and beside it model.safetensors" in refused(model)
    (model / "model.safetensors").unlink()
    check(model)


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "adapter_model.safetensors"])
def test_a_file_that_belongs_to_no_set(model: Path, file: str) -> None:
    """vLLM reads every safetensors file of a folder without an index."""
    write(model, {"some.weight": torch.zeros(2)}, file)
    assert f"got model.safetensors and beside it {file}" in refused(model)


@pytest.mark.parametrize("is_named", [True, False])
def test_a_shard_with_a_tensor_that_the_index_has_elsewhere(model: Path, is_named: bool) -> None:
    """vLLM loads whole shards: whichever comes last would win."""
    tensors, first, second = tensors_of(model), "a.safetensors", "b.safetensors"
    head = {HEAD: tensors.pop(HEAD)}
    write(model, tensors | {HEAD: torch.zeros(128, 64)}, first)
    write(model, head, second)
    weight_map = dict.fromkeys(tensors, first) | ({HEAD: second} if is_named else {})
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (model / "model.safetensors").unlink()
    where = second if is_named else "no file"
    assert f"{first}: expected only tensors that {INDEX_NAME} has in this file, got {HEAD}, " in (
        message := refused(model)
    )
    assert f"has in {where}: one of the two is out of date" in message


def test_buffers_that_no_model_reads_are_no_tensors_of_it(model: Path) -> None:
    write(
        model, tensors_of(model) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    )
    check(model)
