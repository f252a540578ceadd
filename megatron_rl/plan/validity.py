"""What is wrong with the settings of a run on a given cluster: the checks that a run makes before
it starts anything, of which each is tried, so that all problems are told at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.learner.layout.parallel import check_world_size
from megatron_rl.loop.preflight import (
    check_context,
    check_engine_place,
    check_reference,
    check_stop_tokens,
)
from megatron_rl.weights.agreement import check_checkpoint
from megatron_rl.weights.geometry import Geometry


def problems_of(
    config: Config, geometry: Geometry, *, num_nodes: int, gpus_per_node: int
) -> list[str]:
    """Why the run could not start on this cluster, one line each; empty if it could.

    The data, the tokenizer and the programs of the hosts are not looked at. The weights of a
    checkpoint are checked where they are there.
    """
    world_size, parallel = num_nodes * gpus_per_node, config.parallel
    checks: list[Callable[[], object]] = [
        partial(geometry.check_layout, parallel),
        partial(check_world_size, parallel, world_size),
        partial(check_engine_place, config, world_size=world_size, local_world_size=gpus_per_node),
        partial(check_stop_tokens, config, geometry),
        partial(check_context, config, geometry),
        partial(check_reference, config, geometry),
    ]
    if has_weights(config.model.path):
        checks.append(partial(check_checkpoint, config.model.path, geometry))
    found = []
    for check in checks:
        try:
            check()
        except (ConfigError, DataError) as error:
            found.append(str(error))
    return found


def notes_of(config: Config, *, gpus_per_node: int) -> list[str]:
    """What is possible, but probably not meant."""
    notes = []
    if config.parallel.tensor > gpus_per_node:
        notes.append(
            f"parallel.tensor={config.parallel.tensor} is above the {gpus_per_node} GPUs of a "
            "node: every layer's all-reduce leaves the node"
        )
    if not has_weights(config.model.path):
        notes.append(f"model.path={config.model.path} has no *.safetensors: only its shape is used")
    return notes


def has_weights(folder: str) -> bool:
    """Whether a checkpoint folder holds tensors, and not only the shape of a model."""
    return any(Path(folder).glob("*.safetensors"))
