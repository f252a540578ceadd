"""Writes a small Qwen3 checkpoint with a character tokenizer, which transformers and vLLM can load.

    python tools/make_tiny_model.py OUT [--hidden 128] [--layers 4] ...

The weights are random. The defaults give the quickstart's model with 0.8M parameters. Every
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
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
VOCAB_SIZE = 128


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


def build_config(options: argparse.Namespace) -> Qwen3Config:
    """The model's config from the options of the command line."""
    return Qwen3Config(
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
    )


def write_model(out: Path, options: argparse.Namespace) -> int:
    """Write the checkpoint to `out` and return the number of parameters.

    Raises:
        FileExistsError: `out` holds something other than this model.
    """
    torch.manual_seed(options.seed)
    model = Qwen3ForCausalLM(build_config(options)).to(torch.float32)
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
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=0, help="0: three times hidden")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32, help="vLLM on the CPU: 32, 64, ...")
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
    try:
        num_parameters = write_model(options.out, options)
    except FileExistsError as error:
        print(f"make_tiny_model: {error}", file=sys.stderr)
        return 1
    config = json.loads((options.out / "config.json").read_text())
    print(
        f"{options.out}: {config['model_type']}, {num_parameters:,} parameters, "
        f"vocabulary of {config['vocab_size']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
