"""Writes a quantised copy of a Hugging Face checkpoint, which vLLM loads:

    python tools/quantize_checkpoint.py /models/Qwen3-8B -o /models/fp8 --format fp8_channel
    python tools/quantize_checkpoint.py /models/Qwen3-8B -o /models/int4 --format int4_awq \
        --calibration texts.jsonl --column text

Formats: fp8, fp8_channel, fp8_block, int8, int4_awq, nvfp4 (megatron_rl/weights/conversion/
formats.py says what each rounds). fp8, int8, int4_awq and nvfp4 are calibrated by modelopt on the
texts of a file (`pip install --no-deps -r requirements/quantize.txt`), which needs memory for the
whole model; the others need no data and memory for one file. The result is stored as
compressed-tensors. It gets its name when it is complete; the same command goes on with an
interrupted one, and does not calibrate again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_rl.config.hub import model_folder
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.observe.loading import LoadingConsole
from megatron_rl.process.tool import run_tool
from megatron_rl.weights.agreement import check_checkpoint
from megatron_rl.weights.conversion.calibration import calibrate, check_packages
from megatron_rl.weights.conversion.convert import Output
from megatron_rl.weights.conversion.formats import CALIBRATED, FORMATS
from megatron_rl.weights.conversion.quantize import write_quantized
from megatron_rl.weights.fingerprint import model_fingerprint
from megatron_rl.weights.geometry import Geometry, read_geometry

CALIBRATION = "calibration.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)

    def work() -> None:
        _quantize(options)
        print(options.output)

    return run_tool("quantize_checkpoint", work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="Hugging Face checkpoint, or its name in the hub's cache")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--calibration", type=Path, help=".jsonl, or a text file, a text a line")
    parser.add_argument("--column", default="text", help="of a .jsonl file (default: text)")
    parser.add_argument("--num-texts", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=512, help="of each text")
    parser.add_argument("--group-size", type=int, default=128, help="of int4_awq (default 128)")
    parser.add_argument("--max-shard-gib", type=float, default=4.0)
    return parser


def _quantize(options: argparse.Namespace) -> None:
    options.model = Path(model_folder(options.model))
    geometry = read_geometry(options.model)
    check_checkpoint(options.model, geometry)
    is_calibrated = options.format in CALIBRATED
    if is_calibrated:
        check_packages()
        if options.calibration is None:
            raise ConfigError(f"--calibration: expected a file of texts for {options.format}")
        if getattr(geometry, "experts", None) is not None:
            raise ConfigError(
                f"--format: expected fp8_channel or fp8_block for a mixture of experts, got "
                f"{options.format}: not all experts would see the texts"
            )
    # Before the output is begun, whose settings must not change afterwards.
    texts = []
    if is_calibrated:
        texts = read_texts(options.calibration, options.column, options.num_texts)
    what: dict[str, Any] = {
        "source": str(options.model.resolve()),
        "files": model_fingerprint(options.model),
        "max_shard_gib": options.max_shard_gib,
    }
    names = ("format", "column", "num_texts", "max_tokens", "group_size")
    what |= {name: getattr(options, name) for name in names}
    what["calibration"] = str(options.calibration)
    output = Output(folder=options.output.absolute(), what=what)
    output.start()
    with LoadingConsole(is_shown=True) as console:
        found: dict[str, torch.Tensor] = {}
        if is_calibrated:
            found = _calibration(options, texts, geometry, output.partial, console)
        write_quantized(
            options.model,
            geometry,
            options.format,
            found,
            output,
            group_size=options.group_size,
            max_shard_bytes=int(options.max_shard_gib * 2**30),
            progress=lambda done, total: console.progress(f"file {done} of {total}", done / total),
        )
    (output.partial / CALIBRATION).unlink(missing_ok=True)
    output.finish()


def _calibration(
    options: argparse.Namespace,
    texts: Sequence[str],
    geometry: Geometry,
    folder: Path,
    console: LoadingConsole,
) -> dict[str, torch.Tensor]:
    """What modelopt found, now or before an interruption."""
    path = folder / CALIBRATION
    if not path.is_file():
        tokenizer = load_tokenizer(str(options.model), geometry.vocab_size)
        batches = []
        for text in texts:
            token_ids = tokenizer.encode(text)[: options.max_tokens]
            if token_ids:
                batches.append(torch.tensor([token_ids]))
        found = calibrate(
            options.model,
            options.format,
            batches,
            group_size=options.group_size,
            progress=lambda share: console.progress("calibrating", share),
        )
        unfinished = path.with_suffix(".partial")
        save_file(found, unfinished)
        unfinished.rename(path)
    return load_file(path)


def read_texts(path: Path, column: str, count: int) -> list[str]:
    """The first texts of a file.

    Raises:
        DataError: a line has no such column, or the file has no text.
    """
    texts: list[str] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if len(texts) == count:
                break
            if not line.strip():
                continue
            if path.suffix != ".jsonl":
                texts.append(line.rstrip("\n"))
                continue
            try:
                text = json.loads(line)[column]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: expected an object with a column {column} "
                    f"(--column), got {error!r}"
                ) from error
            texts.append(str(text))
    if not texts:
        raise DataError(f"{path}: expected a text in each line, got none")
    return texts


if __name__ == "__main__":
    sys.exit(main())
