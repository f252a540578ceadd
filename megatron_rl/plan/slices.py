"""How much of a weight sync a worker of an engine keeps.

Every worker receives whole tensors (`sync/`), of which vLLM's loaders cut the worker's slice: heads
and the vocabulary, and the columns and rows of feed-forward layers and experts, are divided by
tensor parallelism, key and value heads only as long as there are enough of them. The numbers are
those of vLLM's own dry run of its loaders, with which `tests/plan/test_slices.py` compares them.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.config import Config
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.quantization import quantized_shapes
from megatron_rl.weights.rules import TensorRule, hf_shapes, tensor_rules

VOCAB_MULTIPLE = 64  # vLLM pads the vocabulary to it (vocab_parallel_embedding.py)


def worker_bytes(config: Config, geometry: Geometry, dtype: torch.dtype) -> int:
    """The bytes of a sync that the first worker of an engine keeps; no other one keeps more.

    Args:
        dtype: of the tensors that are sent.
    """
    return sum(
        _kept(rule, index, shape, of_tensor, config, geometry)
        for rule in tensor_rules(geometry)
        for index, named in enumerate(zip(rule.hf_names, hf_shapes(rule, geometry), strict=True))
        for _, of_tensor, shape in quantized_shapes(config.rollout.quantization, [named], dtype)
    )


def _kept(
    rule: TensorRule,
    index: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    config: Config,
    geometry: Geometry,
) -> int:
    """The bytes of tensor number `index` of the rule, or of its scale."""
    tensor, whole = config.rollout.tensor_parallel, math.prod(shape) * dtype.itemsize
    if rule.kind == "replicated" or (rule.kind == "row" and shape[1:] == (1,)):  # or its scale
        return whole
    if rule.kind == "vocab":
        padded = math.ceil(shape[0] / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return min(shape[0], math.ceil(padded / tensor)) * whole // shape[0]
    is_key_or_value = rule.kind == "qkv" and index > 0
    return whole // (min(tensor, geometry.num_query_groups) if is_key_or_value else tensor)
