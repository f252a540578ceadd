"""The learner's checkpoint in, the checkpoint that an engine starts from out.

They are the same one, unless the engine holds its weights in another form than the learner
(`rollout.quantization.format=int8_w8a8`): then it is written once, before the engine starts. What
the engine serves comes by the weight sync in either case.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_rl.config import RolloutConfig
from megatron_rl.weights.huggingface import CheckpointReader, write_checkpoint
from megatron_rl.weights.quantization import engine_settings, quantized


def engine_model(config: RolloutConfig, model_path: str | Path, folder: Path) -> str:
    """Path of the checkpoint for the engine; written to `folder` where it is not `model_path`.

    Raises:
        DataError: a checkpoint that cannot be read.
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
