"""Writes a Megatron checkpoint of a family that `weights/families/` does not have, with the models
of mcore-bridge (https://github.com/modelscope/mcore-bridge), where it is installed.

mcore-bridge builds the model of a Hugging Face checkpoint from Transformer Engine's layers and
loads its tensors; Megatron saves it. So the whole model is in the host's memory, unlike in
`weights/conversion/`, and a conversion that was interrupted begins again. A distributed checkpoint
can be loaded in every layout, so there is one process and no layout. The other direction needs
GPUs in mcore-bridge itself (1.6.5, bridge/gpt_bridge.py, `_all_gather_tp`), and is not here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.errors import ConfigError
from megatron_rl.process.loopback import use_loopback
from megatron_rl.weights.families.family import model_types

NAME = "mcore-bridge"
PACKAGES = ("mcore_bridge", "transformer_engine")


def check_bridge(model_type: str) -> None:
    """Raise ConfigError if mcore-bridge is not installed, or not needed for a family."""
    if model_type in model_types():
        raise ConfigError(
            f"--through {NAME}: expected a family that this package does not convert itself, got "
            f"{model_type}; leave out --through"
        )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--through {NAME}: expected the packages {', '.join(PACKAGES)}, got no "
            f"{', '.join(missing)}; install them beside the packages of requirements/, with pip's "
            "--no-deps so that these stay as they are"
        )


def bridge_to_megatron(source: Path, folder: Path) -> None:
    """Convert the weights of a Hugging Face checkpoint, in its dtype.

    Args:
        folder: empty; receives Megatron's files.

    Raises:
        ConfigError: mcore-bridge does not know the family.
    """
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from mcore_bridge.model import get_mcore_model_type
    from megatron.core import dist_checkpointing
    from transformers import AutoConfig

    described = AutoConfig.from_pretrained(source, local_files_only=True)
    if get_mcore_model_type(described.model_type) is None:
        raise ConfigError(
            f"--through {NAME}: expected a family that it knows, got {described.model_type}"
        )
    with _single_process():
        config = ModelConfig(
            params_dtype=described.dtype or torch.float32,
            use_cpu_initialization=True,
            **hf_to_mcore_config(described),
        )
        parts = get_mcore_model(config)
        config.bridge.load_weights(parts, str(source))
        dist_checkpointing.save(parts[0].sharded_state_dict(), str(folder))


@contextmanager
def _single_process() -> Iterator[None]:
    """Megatron's process groups, with this process alone."""
    from megatron.core import parallel_state

    use_loopback(os.environ)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
