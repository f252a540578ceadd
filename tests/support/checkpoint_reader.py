"""The tensors of a distributed checkpoint, read without Megatron."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, main weights and moments by name, each put together from its shards."""
    state: dict[str, torch.Tensor] = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
