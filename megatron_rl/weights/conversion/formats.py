"""Formats of quantised checkpoints, as compressed-tensors stores them and vLLM loads them.

    fp8          FP8 (E4M3) weights with one scale, activations with one, from calibration
    fp8_channel  FP8 weights with a scale per output channel; activations with one per token
    fp8_block    FP8 weights with a scale per 128 x 128 block; activations with one per token and
                 128 columns
    int8         INT8 weights with a scale per output channel, activations with one scale, from
                 calibration
    int4_awq     INT4 weights with a scale per group of input columns, scaled by AWQ; activations as
                 they are
    nvfp4        FP4 (E2M1) weights and activations with an FP8 scale per 16 columns, and a scale of
                 these scales per tensor, of activations from calibration

A scale is the largest |w| of its part divided by the format's largest number. The arithmetic is
that of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from megatron_rl.errors import ConfigError
from megatron_rl.weights.quantization import BLOCK

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

Format = Literal["fp8", "fp8_channel", "fp8_block", "int8", "int4_awq", "nvfp4"]
FORMATS: tuple[Format, ...] = ("fp8", "fp8_channel", "fp8_block", "int8", "int4_awq", "nvfp4")
CALIBRATED: tuple[Format, ...] = ("fp8", "int8", "int4_awq", "nvfp4")
STORED = {
    "fp8": "float-quantized",
    "fp8_channel": "float-quantized",
    "fp8_block": "float-quantized",
    "int8": "int-quantized",
    "int4_awq": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
FP4_COLUMNS = 16  # of one scale
LARGEST = {"fp8": 448.0, "int8": 127.0}
# Layers whose weights keep their precision: the head, and what sends tokens to experts.
IGNORED = (
    "lm_head",
    "re:.*mlp\\.gate$",
    "re:.*shared_expert_gate$",
    "re:.*block_sparse_moe\\.gate$",
)


def scheme_of(kind: Format, group_size: int) -> QuantizationScheme:
    """The record that describes the format in compressed-tensors."""
    from compressed_tensors.quantization import QuantizationScheme

    float8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
    int8 = float8 | {"type": "int"}
    float4: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True}
    float4 |= {"strategy": "tensor_group", "group_size": FP4_COLUMNS}
    block = {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
    weights, inputs = {
        "fp8": (float8 | {"strategy": "tensor"}, float8 | {"strategy": "tensor"}),
        "fp8_channel": (
            float8 | {"strategy": "channel"},
            float8 | {"strategy": "token", "dynamic": True},
        ),
        "fp8_block": (
            float8 | block,
            float8 | {"strategy": "group", "group_size": BLOCK, "dynamic": True},
        ),
        "int8": (int8 | {"strategy": "channel"}, int8 | {"strategy": "tensor"}),
        "int4_awq": (int8 | {"num_bits": 4, "strategy": "group", "group_size": group_size}, None),
        "nvfp4": (float4, float4 | {"dynamic": "local"}),
    }[kind]
    return QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs, format=STORED[kind]
    )


def compressed(
    kind: Format,
    weight: torch.Tensor,
    *,
    group_size: int,
    largest_weight: torch.Tensor | None = None,
    largest_input: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What the checkpoint holds of a projection.

    Args:
        weight: [O, I].
        largest_weight: of nvfp4: the largest |w| of all weights that the engine joins to one.
        largest_input: of formats with static scales of activations, from calibration.

    Returns:
        By the name behind the projection's: `weight` or `weight_packed`, `weight_scale` and others.

    Raises:
        ConfigError: the groups do not divide the columns.
    """
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = scheme_of(kind, group_size)
    columns = scheme.weights.group_size
    if columns and weight.shape[1] % columns:
        raise ConfigError(
            f"--group-size: expected a divisor of the {weight.shape[1]} columns of a weight, got "
            f"{columns}"
        )
    weight = weight.float()
    tensors = {"weight": weight}
    largest = _largest(kind, weight, columns)
    global_scale = None
    if kind == "nvfp4":
        global_scale = _global_scale(largest.max() if largest_weight is None else largest_weight)
        tensors["weight_global_scale"] = global_scale
    scale, _ = calculate_qparams(-largest, largest, scheme.weights, global_scale=global_scale)
    if kind == "nvfp4":  # the weight is rounded with the scale that is stored
        scale = scale.to(torch.float8_e4m3fn).float()
    tensors["weight_scale"] = scale
    if kind == "fp8_block":  # compressed-tensors would choose other blocks if some are incomplete
        tensors["weight"] = _whole_blocks(weight)
    compressor = BaseCompressor.get_value_from_registry(STORED[kind])
    stored = dict(compressor.compress(tensors, scheme))
    if kind == "fp8_block":
        stored["weight"] = stored["weight"][: weight.shape[0], : weight.shape[1]]
    if kind in LARGEST:
        stored["input_scale"] = (largest_input / LARGEST[kind]).reshape(1).float()
    if kind == "nvfp4":
        stored["input_global_scale"] = _global_scale(largest_input)
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def decompressed(
    kind: Format, stored: Mapping[str, torch.Tensor], *, group_size: int
) -> torch.Tensor:
    """The weight, [O, I], that the engine computes with; the inverse of `compressed`."""
    from compressed_tensors.compressors.base import BaseCompressor

    tensors = dict(stored)
    if kind == "fp8_block":  # compressed-tensors would take a column of blocks for channels
        rows, columns = stored["weight"].shape
        scale = stored["weight_scale"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return stored["weight"].float() * scale[:rows, :columns]
    compressor = BaseCompressor.get_value_from_registry(STORED[kind])
    return compressor.decompress(tensors, scheme_of(kind, group_size))["weight"].float()


def _largest(kind: Format, weight: torch.Tensor, columns: int | None) -> torch.Tensor:
    """The largest |w| of each part of a weight that has one scale."""
    size = weight.abs()
    if kind == "fp8":
        return size.max().reshape(1)
    if kind == "fp8_block":
        return _whole_blocks(size).unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK).amax(dim=(2, 3))
    if columns:
        return size.view(weight.shape[0], -1, columns).amax(dim=2)
    return size.amax(dim=1, keepdim=True)


def _whole_blocks(weight: torch.Tensor) -> torch.Tensor:
    """The weight with zeros added, up to a multiple of the block's rows and columns."""
    missing = -weight.shape[0] % BLOCK, -weight.shape[1] % BLOCK
    return torch.nn.functional.pad(weight, (0, missing[1], 0, missing[0]))


def _global_scale(largest: torch.Tensor) -> torch.Tensor:
    from compressed_tensors.quantization.utils import generate_gparam

    return generate_gparam(-largest.float().reshape(1), largest.float().reshape(1)).reshape(1)


def config_of(kind: Format, group_size: int) -> dict[str, Any]:
    """The key to add to `config.json`."""
    group = scheme_of(kind, group_size).model_dump(exclude_none=True, mode="json")
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": STORED[kind],
            "quantization_status": "compressed",
            "ignore": list(IGNORED),
            "config_groups": {"group_0": group},
        }
    }
