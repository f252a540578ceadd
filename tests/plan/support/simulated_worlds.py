"""Simulates worlds of full-size models.

    python -m tests.plan.support.simulated_worlds SHAPES OUT

Writes `OUT/worlds.json`: for each model the problems of its syncs, and of each rank its parameters
and how many tensors it sent.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_rl.config import Config, ModelConfig, ParallelConfig
from megatron_rl.plan.simulate import problems_in, simulate
from megatron_rl.weights.geometry import read_geometry

# tensor, pipeline, ranks
WORLDS = {"Qwen3-0.6B": (1, 2, 2), "Qwen3-8B": (2, 2, 8), "Llama-3.1-70B": (8, 1, 8)}


def main(shapes: Path, out: Path) -> None:
    found = {}
    for model, (tensor, pipeline, size) in WORLDS.items():
        config = Config(
            model=ModelConfig(path=str(shapes / model), dtype="bfloat16"),
            parallel=ParallelConfig(tensor=tensor, pipeline=pipeline),
        )
        geometry = read_geometry(config.model.path)
        ranks = simulate(config, geometry, world_size=size)
        found[model] = {
            "problems": problems_in(ranks, geometry),
            "num_parameters": [rank.num_parameters for rank in ranks],
            "num_sent": [len(rank.syncs[0]) for rank in ranks],
        }
    (out / "worlds.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
