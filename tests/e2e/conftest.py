"""A tiny model that is sharp enough to tell weights apart, and the settings of a short run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[2]
PAD, EOS = 0, 2


@pytest.fixture(scope="session")
def sharp_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 2 layers with every tensor random, norms included, an entropy well under 70% of
    ln V, and an end-of-sequence token that is hardly ever chosen.
    """
    folder = tmp_path_factory.mktemp("e2e_model") / "model"
    options = "--hidden 64 --layers 2 --heads 2 --kv-heads 2 --head-dim 32 --context 256"
    command = [sys.executable, str(REPOSITORY / "tools/make_tiny_model.py"), str(folder)]
    command += [*options.split(), "--initializer-range", "0.15"]
    subprocess.run(command, check=True, capture_output=True)
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
    return folder


@pytest.fixture(scope="session")
def write_config(sharp_checkpoint: Path) -> Callable[..., Path]:
    """`write_config(folder, **sections)` writes the YAML of a short run; sections replace keys."""

    def write(folder: Path, **sections: dict) -> Path:
        settings: dict[str, dict] = {
            "model": {"path": str(sharp_checkpoint)},
            "data": {
                "tasks": [
                    {
                        "name": "chain_sum",
                        "prompt_column": "metadata.expression",
                        "template": "{prompt}=",
                        "verifier": "tests.e2e.reward:count_digits",
                        "options": {
                            "min_terms": 2,
                            "max_terms": 2,
                            "min_digits": 2,
                            "max_digits": 2,
                        },
                    }
                ],
                "num_held_out": 4,
            },
            "reward": {"num_workers": 1},
            "rollout": {
                "dtype": "float32",
                "num_threads": 1,
                "kv_cache_gib": 0.1,
                "max_num_seqs": 64,
                "sampling": {"max_tokens": 100},
            },
            "learner": {"tokens_per_micro_batch": 1024, "optimizer": {"learning_rate": 5e-3}},
            "eval": {"at_start": False, "at_end": False},
            "checkpoint": {"every": 0, "save_hf": False},
            "loop": {"num_steps": 4, "prompts_per_step": 8, "samples_per_prompt": 8},
        }
        for name, section in sections.items():
            settings[name] = settings.get(name, {}) | section
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write
