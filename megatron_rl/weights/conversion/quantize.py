"""Writes a quantised copy of a Hugging Face checkpoint, file by file, in a format of `formats.py`.

AWQ multiplies the input columns of projections by scales p and divides the columns of their weights
by them. An engine has no such multiplication, so it is moved to what computes these inputs: into
the norm before queries, keys and values, and before gate and up projection, and into the rows of
the up projection before the down projection. Projections that share an input share the geometric
mean of their scales. The output projection of attention keeps its columns, because key-value heads
are shared by query heads whose scales differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_rl.weights.agreement import model_names
from megatron_rl.weights.conversion.calibration import COLUMN_SCALES, LARGEST_INPUT
from megatron_rl.weights.conversion.convert import Output
from megatron_rl.weights.conversion.formats import Format, compressed, config_of
from megatron_rl.weights.families.family import find_family
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.huggingface import (
    CheckpointReader,
    finish_checkpoint,
    shard_names,
    write_index,
)
from megatron_rl.weights.quantization import is_quantized

# The projections that read the same input, and the engine joins to one; and the norm before them.
JOINED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def write_quantized(
    model: Path,
    geometry: Geometry,
    kind: Format,
    calibration: Mapping[str, torch.Tensor],
    output: Output,
    *,
    group_size: int,
    max_shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write the checkpoint. Files that an interrupted call completed are not written again.

    Args:
        calibration: of `calibration.calibrate`; empty for formats that need none.
        output: started.
        max_shard_bytes: of the tensors that a file is made of.
        progress: told the numbers of files that are written, and of all.
    """
    reader = CheckpointReader(model)
    shards = _shards(reader, model_names(reader.names, geometry), max_shard_bytes)
    files = shard_names(len(shards))
    names_in: dict[str, list[str]] = {}
    total = 0
    for number, (file, names) in enumerate(zip(files, shards, strict=True)):
        path = output.partial / file
        if not path.is_file():
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                tensors |= _stored(reader, name, kind, calibration, group_size)
            unfinished = path.with_suffix(".partial")
            save_file(tensors, unfinished, metadata={"format": "pt"})
            unfinished.rename(path)
        with safe_open(path, framework="pt") as written:
            names_in[file] = list(written.keys())
        total += path.stat().st_size
        progress(number + 1, len(shards))
    write_index(output.partial, names_in, total)
    finish_checkpoint(
        output.partial,
        {reader.read(find_family(geometry.model_type).final_norm.hf_names[0], 0, 0, 1).dtype},
        like=model,
        config_changes=config_of(kind, group_size),
    )


def _shards(reader: CheckpointReader, names: Sequence[str], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name in names:
        size = torch.Size(reader.shape(name)).numel() * reader.read(name, 0, 0, 1).dtype.itemsize
        if shards[-1] and num_bytes + size > max_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += size
    return shards


def _stored(
    reader: CheckpointReader,
    name: str,
    kind: Format,
    calibration: Mapping[str, torch.Tensor],
    group_size: int,
) -> dict[str, torch.Tensor]:
    """What the checkpoint holds in place of a tensor, by full name."""
    tensor = scaled(reader.read(name, None, 0, 0), name, calibration)
    if not is_quantized(name):
        return {name: tensor}
    module = name.removesuffix(".weight")
    largest_weight = None
    if kind == "nvfp4":
        together = [
            scaled(reader.read(each, None, 0, 0), each, calibration) for each in _with(name)
        ]
        largest_weight = torch.stack([each.abs().max() for each in together]).max()
    stored = compressed(
        kind,
        tensor,
        group_size=group_size,
        largest_weight=largest_weight,
        largest_input=calibration.get(f"{module}.{LARGEST_INPUT}"),
    )
    return {f"{module}.{local}": value for local, value in stored.items()}


def _with(name: str) -> list[str]:
    """The weights that the engine joins with this one, itself included."""
    for modules in JOINED.values():
        for module in modules:
            if name.endswith(f".{module}.weight"):
                layer = name.removesuffix(f"{module}.weight")
                return [f"{layer}{each}.weight" for each in modules]
    return [name]


def scaled(
    tensor: torch.Tensor, name: str, calibration: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A tensor of the model with AWQ's scales moved into it; unchanged where there are none."""
    result = tensor.float()
    for norm, modules in JOINED.items():
        if name.endswith(f".{norm}.weight"):
            scales = _shared(calibration, name.removesuffix(f"{norm}.weight"), modules)
            if scales is not None:
                result = result * scales
        for module in modules:
            if name.endswith(f".{module}.weight"):
                scales = _shared(calibration, name.removesuffix(f"{module}.weight"), modules)
                if scales is not None:
                    result = result / scales
    if name.endswith((".mlp.up_proj.weight", ".mlp.down_proj.weight")):
        layer = name.rpartition("mlp.")[0]
        scales = calibration.get(f"{layer}mlp.down_proj.{COLUMN_SCALES}")
        if scales is not None:
            is_up = name.endswith(".mlp.up_proj.weight")
            result = result * scales[:, None] if is_up else result / scales
    return result.to(tensor.dtype)


def _shared(
    calibration: Mapping[str, torch.Tensor], layer: str, modules: Sequence[str]
) -> torch.Tensor | None:
    """The geometric mean of the scales of projections with the same input; None without scales."""
    found = [calibration.get(f"{layer}{module}.{COLUMN_SCALES}") for module in modules]
    if any(each is None for each in found):
        return None
    return torch.stack([each.log() for each in found]).mean(dim=0).exp()
