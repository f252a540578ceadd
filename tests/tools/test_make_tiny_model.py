"""The quickstart's model loads, keeps every character apart, and a second run changes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.weights.agreement import check_checkpoint
from megatron_rl.weights.geometry import read_geometry
from megatron_rl.weights.huggingface import CheckpointReader
from megatron_rl.weights.rules import hf_shapes, tensor_rules
from tools import make_tiny_model

EOS_INDEX = torch.tensor([2])
TOOL = Path(make_tiny_model.__file__)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "model"
    command = [sys.executable, str(TOOL), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    return out, result.stdout


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert make_tiny_model.main([str(tmp_path / "file" / "model")]) == 1
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("make_tiny_model: ") and "Not a directory" in told


def test_one_line_with_the_parameter_count(checkpoint):
    out, stdout = checkpoint
    model = AutoModelForCausalLM.from_pretrained(out)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert stdout.splitlines() == [
        f"{out}: qwen3, {count:,} parameters, vocabulary of {model.config.vocab_size}"
    ]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_tokenizer_round_trips_a_token_a_character(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint[0])
    text = "".join(map(chr, range(32, 127))) + "\n37  - 45 =\n -8"
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(token_ids) == len(text)
    assert tokenizer.unk_token_id not in token_ids
    assert tokenizer.decode(token_ids) == text
    assert tokenizer("4+3=").input_ids == [1, 23, 14, 22, 32]
    assert tokenizer.decode([1, 26, 2, 0], skip_special_tokens=True) == "7"
    assert tokenizer("é", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]


def test_ids_of_tokenizer_and_model_agree(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint[0])
    config = AutoModelForCausalLM.from_pretrained(checkpoint[0]).config
    assert len(tokenizer) == config.vocab_size
    named = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert named == (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


def test_it_generates_and_stops_at_eos(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    prompt = AutoTokenizer.from_pretrained(checkpoint[0])("3 + 4=", return_tensors="pt")
    model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(2, EOS_INDEX, 1e4)
    )
    tokens = model.generate(
        input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=4
    )
    assert tokens[0].tolist() == [*prompt.input_ids[0].tolist(), 2]  # not four tokens: it stopped


def test_a_second_run_changes_nothing_and_another_model_is_refused(checkpoint, capsys):
    out = checkpoint[0]
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert make_tiny_model.main([str(out)]) == 0
    assert capsys.readouterr().err == ""
    assert make_tiny_model.main([str(out), "--layers", "2"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "remove it or name another OUT" in line
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert after == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_options_reach_the_model(tmp_path):
    options = ["--hidden", "64", "--layers", "1", "--heads", "2", "--kv-heads", "1"]
    options += ["--tie-embeddings", "--context", "64"]
    assert make_tiny_model.main([str(tmp_path / "other"), *options]) == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "other").config
    shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert shape == (64, 192, 1)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 32)
    assert config.tie_word_embeddings and config.max_position_embeddings == 64


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_mixtures_of_experts(model_type, tmp_path, capsys):
    options = ["--hidden", "64", "--layers", "1", "--experts", "4", "--random-norms"]
    out = tmp_path / "model"
    assert make_tiny_model.main([str(out), "--model-type", model_type, *options]) == 0
    geometry = read_geometry(out)
    check_checkpoint(str(out), geometry)
    count = sum(
        torch.Size(shape).numel()
        for rule in tensor_rules(geometry)
        for shape in hf_shapes(rule, geometry)
    )
    assert f"{out}: {model_type}, {count:,} parameters" in capsys.readouterr().out
    reader = CheckpointReader(out)
    drawn = [name for name in reader.names if name.endswith(("norm.weight", "bias"))]
    for name in drawn:
        assert reader.read(name, None, 0, 0).std() > 0.1, name
    width = 192 if model_type == "mixtral" else 96
    assert geometry.experts.ffn_hidden_size == width
    assert geometry.experts.is_normalised == (model_type != "qwen2_moe")
