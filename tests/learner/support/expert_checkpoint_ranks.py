"""What the ranks of test_expert_checkpoint.py do: save a mixture of experts, load it on other
layouts, save it again there, and go on.

    torchrun --nproc_per_node N -m tests.learner.support.expert_checkpoint_ranks MODEL ROLLOUTS OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.config import ParallelConfig
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.objective.constraint import DualVariable
from tests.learner.support.checkpoint_ranks import (
    SAVED_AFTER,
    Kind,
    build,
    contents,
    load,
    outcome_of,
    save,
    train,
    write,
)

SP = {"tensor": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "ep2": (2, {"expert": 2}),
    "etp2": (2, {"expert_tensor": 2}),
    "tp2_sp": (2, SP),
    "tp2_sp_ep2": (2, SP | {"expert": 2}),
    "pp2": (2, {"pipeline": 2}),
}
KINDS = (
    Kind(name="float32", dtype="float32", is_distributed=False, layout="ep2"),
    Kind(name="bfloat16_distributed", dtype="bfloat16", is_distributed=True, layout="tp2_sp"),
)


def start(layout: str) -> Parallel:
    """Megatron's groups of the layout, in place of those that were there."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return initialize_parallel(ParallelConfig(**LAYOUTS[layout][1], timeout_seconds=60), seed=0)


def save_first(kind: Kind, model: Path, rollouts: Path, out: Path) -> None:
    """Two steps, a checkpoint, and the third step of a run that is not interrupted."""
    learner, dual = build(kind, model, start(kind.layout)), DualVariable(0.5)
    train(learner, rollouts, dual, range(1, 3))
    folder = save(out / kind.name, learner, dual, SAVED_AFTER)
    outcome = outcome_of(learner, train(learner, rollouts, dual, range(3, 4)))
    write(out, f"{kind.name}.uninterrupted", outcome | contents(folder))


def go_on(kind: Kind, layout: str, model: Path, rollouts: Path, out: Path) -> None:
    """Load on a layout, save what was loaded, and do the third step."""
    learner, dual = build(kind, model, start(layout)), DualVariable(0.1)
    step = load(out / kind.name / f"step_{SAVED_AFTER:06d}", learner, dual)
    again = save(out / f"{kind.name}_{layout}", learner, dual, step)
    outcome = outcome_of(learner, train(learner, rollouts, dual, range(step + 1, step + 2)))
    write(out, f"{kind.name}.{layout}", outcome | contents(again))


def main(model: Path, rollouts: Path, out: Path) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    for kind in KINDS:
        if world_size == 2:
            save_first(kind, model, rollouts, out)
        for layout, (ranks, _) in LAYOUTS.items():
            if ranks == world_size:
                go_on(kind, layout, model, rollouts, out)
    dist.barrier()
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:]))
