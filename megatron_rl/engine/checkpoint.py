"""The checkpoint that an engine starts from, given the learner's checkpoint.

It is the same one, unless the engine stores its weights in another format than the learner
(`rollout.quantization.format=int8_w8a8`): then a checkpoint in that format is written once, before
the engine starts. In either case the weights that the engine serves arrive later, by the weight
sync.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.weights.huggingface import CheckpointReader, write_checkpoint
from megatron_rl.weights.quantization import engine_settings, quantized


def engine_model(config: RolloutConfig, model_path: str | Path, folder: Path) -> str:
    """Path of the checkpoint for the engine: `model_path`, or `folder` if one had to be written.

    Raises:
        DataError: the checkpoint cannot be read.
    """
    settings = engine_settings(config.quantization)
    if not settings:
        return str(model_path)
    tensors = quantized(config.quantization, _tensors(model_path))
    write_checkpoint(folder, tensors, like=model_path, config_changes=settings)
    return str(folder)


def _tensors(model_path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    reader = CheckpointReader(model_path)
    for name in reader.names:
        yield name, reader.read(name, None, 0, 0)
