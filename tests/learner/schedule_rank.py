"""Prints what build_optimizer makes of several settings, as JSON: the learning rates of a whole
run, and the weight decay of the parameter groups.

    python -m tests.learner.schedule_rank MODEL
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
from megatron_rl.learner.model.build import build_model
from megatron_rl.learner.model.optimizer import build_optimizer
from megatron_rl.weights.geometry import read_geometry

NUM_UPDATES, LEARNING_RATE = 8, 1e-2
SETTINGS = {
    f"{decay}_{warmup}": OptimizerConfig(
        learning_rate=LEARNING_RATE, decay=decay, warmup_steps=warmup, weight_decay=0.1
    )
    for decay in ("constant", "linear", "cosine")
    for warmup in (0, 3)
}


def main(path: Path) -> None:
    parallel = initialize_parallel(ParallelConfig(), seed=0)
    found = {}
    for name, config in SETTINGS.items():
        model = build_model(
            ModelConfig(path=str(path)),
            read_geometry(path),
            parallel,
            use_distributed_optimizer=False,
        )
        optimizer, scheduler = build_optimizer(config, model, num_updates=NUM_UPDATES)
        rates = []
        for _ in range(NUM_UPDATES):
            scheduler.step(1)
            rates.append([group["lr"] for group in optimizer.param_groups])
        decays = [
            (group["weight_decay"], sorted({parameter.dim() for parameter in group["params"]}))
            for group in optimizer.param_groups
        ]
        found[name] = {"rates": rates, "decays": decays}
    print(json.dumps(found))
    shut_down_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
