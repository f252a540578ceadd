"""Simulates worlds of full-size models.

    python -m tests.plan.support.simulated_worlds SHAPES OUT [large]

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

# The layout and the number of ranks of each model.
WORLDS = {
    "Qwen3-0.6B": (ParallelConfig(pipeline=2), 2),
    "Qwen3-8B": (ParallelConfig(tensor=2, sequence_parallel=True, pipeline=2), 8),
    "Mixtral-8x7B": (
        ParallelConfig(tensor=2, sequence_parallel=True, expert=2, expert_tensor=2, pipeline=2),
        8,
    ),
    "Llama-3.1-70B": (ParallelConfig(tensor=2, pipeline=4, virtual_pipeline=5), 8),
}
# Thousands of experts take minutes.
LARGE_WORLDS = {
    "Qwen3-30B-A3B": (ParallelConfig(tensor=2, sequence_parallel=True, expert=8), 8),
    "Qwen3-235B-A22B": (ParallelConfig(expert=16, pipeline=2), 32),
}


def main(shapes: Path, out: Path, *, is_large: bool) -> None:
    found = {}
    for model, (parallel, size) in (LARGE_WORLDS if is_large else WORLDS).items():
        config = Config(
            model=ModelConfig(path=str(shapes / model), dtype="bfloat16"),
            parallel=parallel,
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
    main(*map(Path, sys.argv[1:3]), is_large="large" in sys.argv[3:])
