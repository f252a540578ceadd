"""[imports megatron] The weights of a checkpoint as Hugging Face tensors, without the optimizer's
state.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_rl.config.model import ModelConfig
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.build import DTYPES, build_parts, transformer_config
from megatron_rl.learner.model.checkpoint import load_model
from megatron_rl.learner.model.export import full_tensors
from megatron_rl.weights.geometry import read_geometry


def saved_tensors(
    folder: Path, model: ModelConfig, parallel: Parallel
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(Hugging Face name, full tensor)` of a checkpoint on global rank 0, in the model's
    dtype; nothing on other ranks. A collective over all ranks, which may be of another layout than
    those that saved it.

    Args:
        folder: the checkpoint, `<run_dir>/checkpoints/step_000012`.
        model: the settings of the run that saved it.

    Raises:
        DataError: the checkpoint is missing, truncated or of a different model. ConfigError: the
            model does not allow the layout.
    """
    geometry, dtype = read_geometry(model.path), DTYPES[model.dtype]
    geometry.check_layout(parallel.layout)
    transformer = transformer_config(geometry, parallel, dtype)
    parts = build_parts(geometry, parallel, transformer, model.path)
    for part in parts:
        part.to(device=parallel.device, dtype=dtype).requires_grad_(False)
    load_model(folder, parts, geometry)
    yield from full_tensors(parts, geometry, parallel)
