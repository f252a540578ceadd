"""Converts checkpoints between Hugging Face and Megatron's distributed format, and between layouts:

    python tools/convert_checkpoint.py runs/a/checkpoints/step_000050
    python tools/convert_checkpoint.py /models/Qwen3-8B -o /models/qwen3_megatron --tensor 4
    python tools/convert_checkpoint.py megatron/iter_0000100 --model /models/Qwen3-8B -o exported
    python tools/convert_checkpoint.py megatron/iter_0000100 --model /models/Qwen3-8B -o other \
        --to megatron --tensor 2 --pipeline 4

The first writes runs/a/huggingface_steps/step_000050. A conversion reads and writes tensor by
tensor, in one process without a GPU, so that it can be used beside a run, whatever its layout is;
the host needs memory for less than one file of the output. Only weights are converted, not an
optimizer's state. The output gets its name when it is complete; the same command goes on with an
interrupted conversion. `--model` is the Hugging Face checkpoint whose config and tokenizer the
model has; a checkpoint of a run remembers it.

Other families than those of megatron_rl/weights/families/ are converted to Megatron by
`--through mcore-bridge`, where that package and Transformer Engine are installed; the host then
needs memory for the whole model.

A distributed checkpoint contains pickled metadata, which is read without running code that it may
name.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Before torch is imported: a run may need all of the GPU's memory.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from megatron_rl.config import ParallelConfig
from megatron_rl.config.hub import how_to_fetch, model_folder
from megatron_rl.data.tokenizer import read_template
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.learner.model.bridged import NAME, bridge_to_megatron, check_bridge
from megatron_rl.learner.model.checkpoint_files import STATE, saved_run_state
from megatron_rl.learner.model.checkpoint_sums import check_sums
from megatron_rl.loop.hf_checkpoints import OF_STEPS
from megatron_rl.observe.loading import LoadingConsole
from megatron_rl.process.tool import run_tool
from megatron_rl.weights.agreement import check_checkpoint
from megatron_rl.weights.conversion.convert import Output, to_huggingface, to_megatron, verify
from megatron_rl.weights.conversion.distributed import METADATA
from megatron_rl.weights.conversion.sources import HuggingFaceSource, MegatronSource, Source
from megatron_rl.weights.fingerprint import distributed_fingerprint, model_fingerprint
from megatron_rl.weights.geometry import Geometry, read_geometry, read_hf_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to convert. Example: `Request(source=Path("/models/a"), output=Path("out"),
    is_megatron=False, to_megatron=True, model=Path("/models/a"), chat_template="")`.
    """

    source: Path
    output: Path
    is_megatron: bool  # the source
    to_megatron: bool
    model: Path
    chat_template: str


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    return run_tool("convert_checkpoint", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    request = _request(options)
    if options.through:
        _convert_through_bridge(request, options)
    else:
        layout = ParallelConfig(
            tensor=options.tensor,
            sequence_parallel=options.tensor > 1,
            pipeline=options.pipeline,
            virtual_pipeline=options.virtual_pipeline,
            stage_layers=options.stage_layers,
            **_expert_sizes(options),
        )
        _convert(request, layout, options)
    print(request.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "source", help="the folder of a checkpoint, or a model's name in the hub's cache"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help=f"of a run's checkpoint: <run_dir>/{OF_STEPS}/<its name>"
    )
    parser.add_argument("--to", choices=("huggingface", "megatron"), help="default: the other one")
    parser.add_argument(
        "--model", help="of the config and tokenizer: a Hugging Face folder or name, as above"
    )
    parser.add_argument(
        "--through", choices=(NAME,), help="what converts a family that this package does not know"
    )
    parser.add_argument("--verify", action="store_true", help="compare every byte afterwards")
    parser.add_argument(
        "--max-shard-gib", type=float, default=4.0, help="of a Hugging Face file (default 4)"
    )
    layout = parser.add_argument_group("layout of Megatron's checkpoint")
    for name in ("tensor", "pipeline", "virtual-pipeline", "expert", "expert-tensor"):
        layout.add_argument(f"--{name}", type=int, default=1)
    layout.add_argument("--stage-layers", type=int, nargs="*", default=[])
    return parser


def _expert_sizes(options: argparse.Namespace) -> dict[str, int]:
    return {"expert": options.expert, "expert_tensor": options.expert_tensor}


def _request(options: argparse.Namespace) -> Request:
    source = Path(model_folder(options.source)).resolve()
    is_megatron = (source / METADATA).is_file() or (source / STATE).is_file()
    if is_megatron:
        check_sums(source)  # of a run's checkpoint
    if not is_megatron and not (source / "config.json").is_file():
        raise DataError(
            f"{source}: expected a checkpoint, with config.json (Hugging Face) or {METADATA} "
            f"(Megatron, the folder of one iteration), got neither{how_to_fetch(options.source)}"
        )
    goes_to_megatron = options.to == "megatron" if options.to else not is_megatron
    if not is_megatron and not goes_to_megatron:
        raise ConfigError("--to: expected megatron for a Hugging Face checkpoint, got huggingface")
    settings = settings_of(source) if is_megatron and not options.model else {}
    output = options.output
    if output is None:
        if not (source / STATE).is_file() or goes_to_megatron:
            raise ConfigError("--output: expected a folder, got none")
        output = source.parents[1] / OF_STEPS / source.name
    model = options.model or (settings["model"]["path"] if settings else str(source))
    template = read_template(settings["data"].get("chat_template_file", "")) if settings else ""
    return Request(
        source=source,
        output=output.absolute(),
        is_megatron=is_megatron,
        to_megatron=goes_to_megatron,
        model=Path(model_folder(model)),
        chat_template=template,
    )


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that saved a checkpoint, as plain JSON values.

    Raises:
        ConfigError: no run saved it. DataError: the run was of an older version.
    """
    if not (checkpoint / STATE).is_file():
        raise ConfigError(
            f"--model: expected the Hugging Face folder of the model in {checkpoint}, got none"
        )
    settings = saved_run_state(checkpoint).get("inputs", {}).get("settings", {})
    if not settings:
        raise DataError(
            f"{checkpoint}: expected a checkpoint that says which model it is of, got one of an "
            "older version, which does not; give the model with --model"
        )
    return settings


def _convert(request: Request, layout: ParallelConfig, options: argparse.Namespace) -> None:
    geometry = read_geometry(request.model)
    source = _source(request.source, geometry, request.is_megatron)
    what: dict[str, Any] = {"source": str(request.source), "model": str(request.model)}
    if request.is_megatron:
        what["files"] = distributed_fingerprint(request.source)
    else:
        check_checkpoint(request.source, geometry)
        what["files"] = model_fingerprint(request.source)
    with LoadingConsole(is_shown=True) as console:

        def written(done: int, total: int) -> None:
            console.progress(f"{done / 2**30:.2f} of {total / 2**30:.2f} GiB", done / total)

        def compared(done: int, total: int) -> None:
            console.progress("comparing with the source", done / total)

        if request.to_megatron:
            output = Output(folder=request.output, what=what | {"layout": _named(layout)})
            to_megatron(source, geometry, layout, output, progress=written)
        else:
            max_bytes = int(options.max_shard_gib * 2**30)
            to_huggingface(
                source,
                geometry,
                Output(folder=request.output, what=what | {"max_shard_bytes": max_bytes}),
                like=request.model,
                progress=written,
                max_shard_bytes=max_bytes,
                chat_template=request.chat_template,
            )
        if options.verify:
            made = _source(request.output, geometry, request.to_megatron)
            verify(made, source, geometry, progress=compared)


def _convert_through_bridge(request: Request, options: argparse.Namespace) -> None:
    if not request.to_megatron or request.is_megatron or options.verify:
        raise ConfigError(
            f"--through {NAME}: expected a Hugging Face checkpoint, to Megatron and without "
            "--verify; mcore-bridge writes Hugging Face checkpoints on GPUs only, with its own "
            "save_weights"
        )
    check_bridge(read_hf_config(request.source, "source").get("model_type", ""))
    what = {"source": str(request.source), "through": NAME}
    output = Output(folder=request.output, what=what | {"files": model_fingerprint(request.source)})
    output.start()
    with TemporaryDirectory(dir=output.partial) as folder:
        bridge_to_megatron(request.source, Path(folder))
        for file in Path(folder).iterdir():
            file.rename(output.partial / file.name)
    output.finish()


def _source(folder: Path, geometry: Geometry, is_megatron: bool) -> Source:
    return (MegatronSource if is_megatron else HuggingFaceSource)(folder, geometry)


def _named(layout: ParallelConfig) -> dict[str, Any]:
    names = ("tensor", "pipeline", "virtual_pipeline", "stage_layers", "expert", "expert_tensor")
    return {name: getattr(layout, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
