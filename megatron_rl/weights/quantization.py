"""Rounds the learner's weights for an engine of lower precision.

    int8, fp8, int4   only the weights are rounded to the format's grid; they are sent in the
                      engine's own dtype, so that any engine can serve them
    int8_w8a8         INT8 weights with a scale per output channel, in the format of
                      compressed-tensors; the engine also rounds activations to INT8, with a scale
                      per token

Rounding is symmetric and to the nearest value, with `scale = max |w| / (range / 2)` over an output
channel, a group of inputs or a 128 x 128 block. The arithmetic is that of compressed-tensors. Only
the projections of the layers are rounded; embeddings, norms, biases, routers and the head keep
their precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from megatron_rl.config.rollout import QuantizationConfig

BLOCK = 128
_ELEMENTS = {"int8": (8, "int"), "fp8": (8, "float"), "int4": (4, "int"), "int8_w8a8": (8, "int")}

Named = tuple[str, torch.Tensor]


def is_quantized(name: str) -> bool:
    """Whether the Hugging Face tensor of this name is rounded."""
    return ".layers." in name and name.endswith("_proj.weight")


def wire_dtype_of(config: QuantizationConfig, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `quantized` yields a tensor that has `dtype` in the learner."""
    return torch.int8 if config.format == "int8_w8a8" and is_quantized(name) else dtype


def quantized(config: QuantizationConfig, tensors: Iterable[Named]) -> Iterator[Named]:
    """The tensors that the engine receives, computed lazily from the learner's, in the same order.

    With `int8_w8a8` each rounded weight [O, I] int8 is followed by `<name>_scale` [O, 1] float32.
    """
    for name, tensor in tensors:
        if config.format == "none" or not is_quantized(name):
            yield name, tensor
        elif config.format == "int8_w8a8":
            weight, scale = int8_weight(tensor)
            yield name, weight
            yield f"{name}_scale", scale
        else:
            yield name, rounded(config, tensor)


def quantized_shapes(
    config: QuantizationConfig, shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of the tensors that `quantized` yields, for tensors in `dtype`."""
    for name, shape in shapes:
        yield name, wire_dtype_of(config, name, dtype), shape
        if config.format == "int8_w8a8" and is_quantized(name):
            yield f"{name}_scale", torch.float32, (shape[0], 1)


def rounded(config: QuantizationConfig, weight: torch.Tensor) -> torch.Tensor:
    """A floating-point weight [O, I] rounded to the format's grid, in the same dtype."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    rows, restore = _rows_of_one_scale(config, weight.float())
    scale, zero_point, element = _scales(config.format, rows)
    return restore(fake_quantize(rows, scale, zero_point, element)).to(weight.dtype)


def int8_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a floating-point weight [O, I] to [O, I] int8 with scales [O, 1] float32."""
    from compressed_tensors.quantization.lifecycle.forward import quantize

    rows = weight.float()
    scale, zero_point, element = _scales("int8_w8a8", rows)
    return quantize(rows, scale, zero_point, element, dtype=torch.int8), scale


def _scales(kind: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The scale, [R, 1] float32, and the zero point (0) of each row, and the record that describes
    the format in compressed-tensors.
    """
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    num_bits, kind_of_number = _ELEMENTS[kind]
    element = QuantizationArgs(num_bits=num_bits, type=kind_of_number, strategy="channel")
    low, high = rows.aminmax(dim=1, keepdim=True)
    return *calculate_qparams(low, high, element), element


def _rows_of_one_scale(
    config: QuantizationConfig, weight: torch.Tensor
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Reshape a weight [O, I] into rows with one scale each; also returns the inverse function.

    Incomplete groups and blocks are padded with zeros, which do not change the scale.
    """
    if config.strategy == "channel":
        return weight, lambda rows: rows
    height, width = (1, config.group_size) if config.strategy == "group" else (BLOCK, BLOCK)
    num_down, num_across = (math.ceil(n / m) for n, m in zip(weight.shape, (height, width)))
    missing = num_across * width - weight.shape[1], num_down * height - weight.shape[0]
    filled = torch.nn.functional.pad(weight, (0, missing[0], 0, missing[1]))
    blocks = filled.view(num_down, height, num_across, width).transpose(1, 2)

    def restore(rows: torch.Tensor) -> torch.Tensor:
        whole = rows.view(blocks.shape).transpose(1, 2).reshape(filled.shape)
        return whole[: weight.shape[0], : weight.shape[1]].contiguous()

    return blocks.reshape(num_down * num_across, height * width), restore


def engine_settings(config: QuantizationConfig) -> dict[str, Any]:
    """The keys to add to the engine's `config.json`; empty for weight-only formats."""
    if config.format != "int8_w8a8":
        return {}
    element = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": element | {"strategy": "channel", "dynamic": False},
        "input_activations": element | {"strategy": "token", "dynamic": True},
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }
    }
