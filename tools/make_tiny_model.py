"""Writes a small checkpoint with a character tokenizer, which transformers and vLLM can load.

    python tools/make_tiny_model.py OUT [--hidden 128] [--layers 4] ...
    python tools/make_tiny_model.py OUT --model-type qwen3_moe --experts 8 --random-norms

The weights are random. The defaults give the quickstart's Qwen3 with 0.8M parameters. Every
printable ASCII character and the newline is one token, so every digit of a number is a token of its
own; a prompt starts with `<bos>`. The same options give the same bytes. OUT is created only when it
is complete. If OUT already holds this model, nothing is written; if it holds anything else, that is
an error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils.logging import disable_progress_bar

from megatron_rl.errors import ConfigError
from megatron_rl.process.tool import run_tool

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
VOCAB_SIZE = 128
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "qwen2_moe": Qwen2MoeConfig,  # with a shared expert
    "mixtral": MixtralConfig,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: ids 0, 1, 2 are pad, bos, eos; 3 to 97 are printable ASCII."""
    tokens = [PAD, BOS, EOS, *map(chr, range(32, 127)), "\n", UNK]
    tokens += [f"<extra{index}>" for index in range(len(tokens), VOCAB_SIZE)]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding puts a space between the characters
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def build_config(options: argparse.Namespace) -> PreTrainedConfig:
    """The model's config from the options of the command line."""
    return CONFIGS[options.model_type](
        vocab_size=VOCAB_SIZE,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate or 3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=options.context,
        tie_word_embeddings=options.tie_embeddings,
        initializer_range=options.initializer_range,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
        **_expert_options(options),
    )


def _expert_options(options: argparse.Namespace) -> dict[str, object]:
    """Of a mixture of experts; empty for a dense model."""
    if options.model_type == "qwen3":
        return {}
    num_chosen = {"num_experts_per_tok": options.chosen_experts}
    if options.model_type == "mixtral":  # whose experts have the width of --intermediate
        return num_chosen | {"num_local_experts": options.experts}
    sizes = {"num_experts": options.experts, "moe_intermediate_size": options.expert_width}
    if options.model_type == "qwen2_moe":
        return num_chosen | sizes | {"shared_expert_intermediate_size": 2 * options.expert_width}
    return num_chosen | sizes | {"norm_topk_prob": True}


def _randomize(model: torch.nn.Module) -> None:
    """Draw norms and biases too: they are ones and zeros in a new model, so swapped ones would go
    unseen.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.3).add_(1.0)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)


def write_model(out: Path, options: argparse.Namespace) -> int:
    """Write the checkpoint to `out` and return the number of parameters.

    Raises:
        FileExistsError: `out` holds something other than this model.
    """
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(build_config(options)).to(torch.float32)
    if options.random_norms:
        _randomize(model)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    build_tokenizer().save_pretrained(partial)
    if not out.exists():
        partial.rename(out)
    elif _fingerprint(out) == _fingerprint(partial):
        shutil.rmtree(partial)
    else:
        shutil.rmtree(partial)
        raise FileExistsError(
            f"expected {out} to be absent or to hold this very model, got other files; "
            "remove it or name another OUT"
        )
    return model.num_parameters()


def _fingerprint(folder: Path) -> dict[str, bytes]:
    """File name -> content; a checkpoint of this tool is a few MB in a single folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--model-type", choices=CONFIGS, default="qwen3")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=0, help="0: three times hidden")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32, help="vLLM on the CPU: 32, 64, ...")
    parser.add_argument("--experts", type=int, default=8, help="of a mixture of experts")
    parser.add_argument("--chosen-experts", type=int, default=2, help="that a token is sent to")
    parser.add_argument("--expert-width", type=int, default=96, help="columns of one expert")
    parser.add_argument(
        "--random-norms", action="store_true", help="draw norms and biases too, for comparisons"
    )
    parser.add_argument("--context", type=int, default=256, help="positions")
    parser.add_argument(
        "--initializer-range",
        type=float,
        default=0.06,
        help="standard deviation of the weights; with the usual 0.02 it learns sums half as fast",
    )
    parser.add_argument("--tie-embeddings", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    disable_progress_bar()
    return run_tool("make_tiny_model", lambda: _make(options))


def _make(options: argparse.Namespace) -> None:
    sizes = ("hidden", "layers", "heads", "kv_heads", "head_dim", "experts", "chosen_experts")
    for name in (*sizes, "expert_width", "context"):
        if getattr(options, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: expected 1 or more, got {getattr(options, name)}")
    if options.heads % options.kv_heads:
        raise ConfigError(
            f"--kv-heads: expected a divisor of --heads {options.heads}, got {options.kv_heads}"
        )
    if options.chosen_experts > options.experts:
        raise ConfigError(
            f"--chosen-experts: expected at most --experts {options.experts}, "
            f"got {options.chosen_experts}"
        )
    num_parameters = write_model(options.out, options)
    config = json.loads((options.out / "config.json").read_text())
    print(
        f"{options.out}: {config['model_type']}, {num_parameters:,} parameters, "
        f"vocabulary of {config['vocab_size']}"
    )


if __name__ == "__main__":
    sys.exit(main())
