"""What the ranks of test_with_megatron.py do: Megatron loads converted checkpoints in a layout of
its own, and saves them again.

    torchrun --nproc_per_node 2 -m tests.weights.conversion.megatron_ranks FOLDER CASE...

A case is `model:layout`; of each, FOLDER/<model> is the Hugging Face checkpoint, FOLDER/<case>/in
what a conversion wrote, and FOLDER/<case>/out what Megatron saves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import ModelConfig, ParallelConfig
from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
from megatron_rl.learner.model.build import build_parts, transformer_config
from megatron_rl.learner.model.checkpoint import _load, _load_parts, _sharded_model
from megatron_rl.learner.model.checkpoint_share import _results_stay_in_process
from megatron_rl.weights.geometry import read_geometry

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2, "sequence_parallel": True},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "ep2": {"expert": 2},
}


def load_and_save(folder: Path, model: Path, layout: str) -> None:
    """Load `folder/in` over weights that are all zero, and save what was loaded."""
    from megatron.core import dist_checkpointing, parallel_state

    parallel = initialize_parallel(ParallelConfig(**LAYOUTS[layout]), seed=0)
    geometry = read_geometry(model)
    transformer = transformer_config(geometry, parallel, ModelConfig())
    parts = build_parts(geometry, parallel, transformer, model)
    with torch.no_grad():
        for part in parts:
            for parameter in part.parameters():
                parameter.zero_()
    state = {"model": _sharded_model(parts)}
    loaded = _load(state, folder / "in", has_extra_states=True)
    _load_parts(parts, loaded["model"])
    _results_stay_in_process()
    if parallel.rank == 0:
        (folder / "out").mkdir()
    parallel.barrier()
    dist_checkpointing.save({"model": _sharded_model(parts)}, str(folder / "out"))
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    for case in sys.argv[2:]:
        name, layout = case.split(":")
        load_and_save(Path(sys.argv[1]) / case, Path(sys.argv[1]) / name, layout)
    shut_down_parallel()
