"""Provides the checkpoint that an engine starts from, given the learner's checkpoint.

The engine uses the learner's checkpoint, unless it stores its weights in a different format
(`rollout.quantization.format=int8_w8a8`). In that case a checkpoint in the engine's format is
written once, before the engine starts. In both cases the weight sync later sends the weights that
the engine actually serves. An engine that is sent none, in an evaluation without training, starts
from the weights that a sync would send, for every format of `rollout.quantization`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.weights.agreement import model_names
from megatron_rl.weights.geometry import read_geometry
from megatron_rl.weights.huggingface import CheckpointReader, write_checkpoint
from megatron_rl.weights.quantization import engine_settings, quantized


def engine_model(
    config: RolloutConfig, model_path: str | Path, folder: Path, *, is_sent_weights: bool = True
) -> str:
    """Path of the checkpoint for the engine: `model_path`, or `folder` if one had to be written.

    Args:
        is_sent_weights: whether a weight sync sends the engine weights before it is used.

    Raises:
        DataError: the checkpoint cannot be read.
    """
    settings = engine_settings(config.quantization)
    is_rounded = config.quantization.format != "none"
    if not settings and (is_sent_weights or not is_rounded):
        return str(model_path)
    tensors = quantized(config.quantization, _tensors(model_path))
    write_checkpoint(folder, tensors, like=model_path, config_changes=settings)
    return str(folder)


def _tensors(model_path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    reader = CheckpointReader(model_path)
    for name in model_names(reader.names, read_geometry(model_path)):
        yield name, reader.read(name, None, 0, 0)
