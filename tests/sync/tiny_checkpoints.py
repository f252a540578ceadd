"""Tiny checkpoints of several kinds, with every tensor random, norms and biases included."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_rl.sync.source import WeightStream
from megatron_rl.sync.wire import TensorSpec

COMMON = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}


def write_checkpoint(folder: Path, variant: str, seed: int, *, num_layers: int = 2) -> Path:
    """Write `variant` (untied, tied, tied_copy, biased, moe, bfloat16, int8) with weights drawn
    from `seed`.
    """
    torch.manual_seed(seed)
    common = COMMON | {"num_hidden_layers": num_layers}
    if variant == "moe":
        config = Qwen3MoeConfig(**common, **MOE, tie_word_embeddings=False)
    elif variant == "biased":
        config = Qwen2Config(**common, tie_word_embeddings=False)
    else:
        config = Qwen3Config(**common, head_dim=32, tie_word_embeddings=variant.startswith("tied"))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, spread)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    dtype = torch.bfloat16 if variant in ("bfloat16", "int8") else torch.float32
    model.to(dtype).save_pretrained(folder)
    if variant == "tied_copy":
        _add_head(folder)
    if variant == "int8":
        _quantise(folder)
    if variant == "biased":
        _add_dead_buffer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token a printable character, enough for a server to start."""
    tokens = ["<pad>", "<bos>", "<eos>", *(chr(code) for code in range(32, 127))]
    tokens += [f"<extra{index}>" for index in range(len(tokens), COMMON["vocab_size"])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors in layer order: embedding, layers, norm, head; what a learner
    publishes, so without dead buffers and without the copy of a tied head.
    """
    tensors = load_file(folder / "model.safetensors")
    is_tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    left_out = ("inv_freq", "lm_head.weight") if is_tied else ("inv_freq",)
    names = [name for name in tensors if not name.endswith(left_out)]
    return {name: tensors[name] for name in sorted(names, key=_layer_order)}


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [
        TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def stream_of(tensors: dict[str, torch.Tensor]) -> WeightStream:
    """All of them, announced as they are."""
    return WeightStream(specs=tuple(specs_of(tensors)), tensors=tensors.items())


def _layer_order(name: str) -> tuple[int, int, str]:
    if "embed_tokens" in name:
        return 0, 0, name
    if ".layers." in name:
        return 1, int(name.split(".layers.")[1].split(".")[0]), name
    return 2, 0, name


def _add_head(folder: Path) -> None:
    """The head that a tied model has not, equal to the embedding."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _add_dead_buffer(folder: Path) -> None:
    """A buffer that no model reads, as Llama checkpoints of 2023 contain it."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _quantise(folder: Path) -> None:
    """INT8 W8A8 as compressed-tensors stores it: per-channel weights, dynamic per-token
    activations.
    """
    tensors = load_file(folder / "model.safetensors")
    quantised = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
            quantised[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
            quantised[name + "_scale"] = scale
        else:
            quantised[name] = tensor
    save_file(quantised, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = INT8
    (folder / "config.json").write_text(json.dumps(config, indent=2))
