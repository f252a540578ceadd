"""`python -m tests.learner.support.bridged PACKAGES FOLDER`: tiny checkpoints to Megatron through
mcore-bridge, compared with what our own conversion reads; then two families that only the tool's
option converts, of which mcore-bridge knows one.

PACKAGES is the folder of Transformer Engine's pure-Python wheel.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.compiled_part import install
from tests.sync.tiny_checkpoints import write_checkpoint

VARIANTS = ("untied", "tied", "biased", "moe", "bfloat16")


def write_others(folder: Path) -> None:
    """A tiny OLMoE, and the config of a GPT-2."""
    from transformers import GPT2Config, OlmoeConfig, OlmoeForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    OlmoeForCausalLM(OlmoeConfig(**sizes, **heads, **experts, **tokens)).save_pretrained(
        folder / "olmoe"
    )
    GPT2Config().save_pretrained(folder / "gpt2")
    weights = (folder / "olmoe" / "model.safetensors").read_bytes()
    (folder / "gpt2" / "model.safetensors").write_bytes(weights)


def main(packages: Path, folder: Path) -> None:
    """Before mcore-bridge is imported, all models are written; it changes transformers' classes."""
    import transformers.generation.continuous_batching  # noqa: F401  before torch claims a GPU

    for variant in VARIANTS:
        write_checkpoint(folder / variant, variant, 1)
    write_others(folder)
    install(packages)

    from megatron_rl.learner.model.bridged import bridge_to_megatron
    from megatron_rl.weights.conversion.convert import verify
    from megatron_rl.weights.conversion.sources import HuggingFaceSource, MegatronSource
    from megatron_rl.weights.geometry import read_geometry
    from tools import convert_checkpoint

    for variant in VARIANTS:
        source, made = folder / variant, folder / f"{variant}_megatron"
        made.mkdir()
        bridge_to_megatron(source, made)
        geometry = read_geometry(source)
        verify(
            MegatronSource(made, geometry),
            HuggingFaceSource(source, geometry),
            geometry,
            progress=lambda done, total: None,
        )
        print(f"equal {variant}")
    codes = []
    for name in ("olmoe", "gpt2"):
        output = ["-o", str(folder / f"{name}_megatron"), "--through", "mcore-bridge"]
        codes.append(convert_checkpoint.main([str(folder / name), *output]))
    print("exit codes", *codes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
