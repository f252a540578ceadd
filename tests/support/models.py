"""The tiny models that tests train: written by the project's own tool, in this process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tools import make_tiny_model

PAD, EOS = 0, 2


def write_tiny_model(folder: Path) -> None:
    """A Qwen3 of 2 layers and hidden size 64 with a character tokenizer (vocabulary of 128)."""
    options = "--hidden 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 32 --initializer-range 0.1"
    _make(folder, options)


def write_sharp_model(folder: Path) -> None:
    """A Qwen3 of 2 layers that is sharp enough to tell weights apart: every tensor random, norms
    included, an entropy well under 70% of ln V, and an end-of-sequence token that is hardly ever
    chosen.
    """
    options = "--hidden 64 --layers 2 --heads 2 --kv-heads 2 --head-dim 32 --context 256"
    _make(folder, f"{options} --initializer-range 0.15")
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    # transformers leaves it at zero, where the gradient of a norm has no bound.
    tensors["model.embed_tokens.weight"][PAD].normal_(std=0.15, generator=generator)
    tensors["lm_head.weight"] *= 2.0
    tensors["lm_head.weight"][EOS] = 0.0  # a logit of 0, where the largest is about 6
    save_file(tensors, path, metadata={"format": "pt"})


SMALL = {
    "dense": "--kv-heads 4",
    "tied": "--kv-heads 2 --tie-embeddings",
    "moe": "--kv-heads 2 --model-type qwen3_moe --experts 8 --expert-width 32",
}


def write_small_model(folder: Path, kind: str) -> None:
    """A model of 4 layers and hidden size 64 of a kind in SMALL; or `large`: of 92 MiB."""
    if kind != "large":
        _make(folder, f"--hidden 64 --layers 4 --heads 4 --head-dim 32 {SMALL[kind]}")
        return
    _make(folder, "--hidden 512 --layers 8 --heads 4 --kv-heads 4 --head-dim 64")


def write_tiny_experts(folder: Path, *, expert_width: int = 48, layers: int = 2) -> None:
    """A Qwen3-MoE of layers of 4 experts with a character tokenizer; norms are random."""
    options = "--model-type qwen3_moe --hidden 64 --heads 4 --kv-heads 2 --head-dim 32"
    experts = f"--experts 4 --expert-width {expert_width} --random-norms"
    _make(folder, f"{options} --layers {layers} {experts} --initializer-range 0.1")


def _make(folder: Path, options: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        code = make_tiny_model.main([str(folder), *options.split()])
    assert code == 0
