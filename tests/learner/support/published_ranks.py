"""What the ranks of test_published_algorithm.py do: training steps with the preset `dc_grpo`, in
every layout of this world size.

    torchrun --nproc_per_node N -m tests.learner.support.published_ranks MODEL ROLLOUTS OUT BRIEF

Rank 0 writes `OUT/<layout>.pt`. BRIEF is the number of steps of layouts that combine others; the
rest take all NUM_STEPS.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_rl.config.file import load_config
from megatron_rl.learner.batch.deal import deal_batch
from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.update.step import train_step
from megatron_rl.loop.state import initial_state
from megatron_rl.weights.geometry import read_geometry
from tests.learner import recorded
from tests.learner.support.exported import exported_gradients, exported_weights
from tests.learner.support.step_ranks import one_per_row

NUM_STEPS, NUM_MINI_BATCHES = 20, 4
# lambda moves by about 0.05 a step here, and the lower bound holds it at times.
ETA, TOLERANCE = 20.0, 0.0037
# The paper's, but for a learning rate at which the policy of this model leaves the clip's interval,
# and no clipping of gradients.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, betas=(0.9, 0.95), epsilon=1e-15, weight_decay=0.0, clip_grad=0.0
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to do the same steps."""

    name: str
    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    tokens_per_row: int = 256
    is_packed: bool = True
    is_distributed: bool = False  # the optimizer
    is_brief: bool = False


LAYOUTS = (
    Layout(name="dp1"),
    Layout(name="dp2", ranks=2, tokens_per_row=48),
    Layout(name="tp2", ranks=2, tensor=2),
    Layout(name="pp2", ranks=2, pipeline=2),
    Layout(name="dp1_unpacked", tokens_per_row=48, is_packed=False, is_brief=True),
    Layout(name="dp2_distributed", ranks=2, is_distributed=True, is_brief=True),
    Layout(name="tp2_pp2", ranks=4, tensor=2, pipeline=2, is_brief=True),
    Layout(name="tp2_dp2", ranks=4, tensor=2, is_brief=True),
    Layout(name="pp2_dp2", ranks=4, pipeline=2, is_brief=True),
)


def recorded_step(step: int) -> int:
    """The step of the recording that a training step learns from."""
    return (step - 1) % recorded.NUM_STEPS + 1


def objective(path: Path) -> ObjectiveConfig:
    """The preset's on an empty file, which is written to `path`, with this test's eta."""
    path.touch()
    config = load_config(path, ["objective.preset=dc_grpo"]).objective
    constraint = replace(config.constraint, learning_rate=ETA, tolerance=TOLERANCE)
    return replace(config, constraint=constraint)


def run_layout(
    layout: Layout, model: Path, rollouts: Path, config: ObjectiveConfig, *, num_steps: int
) -> tuple[int, dict[str, Any]]:
    """This rank; and of every step, on rank 0, what it reported and the gradients that it left."""
    parallel = initialize_parallel(
        ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline, timeout_seconds=60), seed=0
    )
    learner = Learner(
        ModelConfig(path=str(model)),
        replace(OPTIMIZER, distributed=layout.is_distributed),
        read_geometry(model),
        parallel,
        num_updates=num_steps * NUM_MINI_BATCHES,
    )
    dual, steps = initial_state(config.constraint).dual, []
    for step in range(1, num_steps + 1):
        batch = deal_batch(
            recorded.read_samples(rollouts, recorded_step(step), parallel),
            parallel,
            samples_per_prompt=recorded.NUM_SAMPLES,
            num_mini_batches=NUM_MINI_BATCHES,
            tokens_per_row=layout.tokens_per_row,
        )
        if not layout.is_packed:
            batch = one_per_row(batch, layout.tokens_per_row, parallel)
        report, _ = train_step(
            learner, batch, dual, config, step=step, weight_version=step - 1, should_recompute=False
        )
        gradients = None if layout.is_distributed else exported_gradients(learner)
        steps.append((report, gradients, exported_weights(learner)))
    return parallel.rank, {"steps": steps}


def main(model: Path, rollouts: Path, out: Path, brief: int) -> None:
    from megatron.core import parallel_state

    config = objective(out / f"empty_{os.environ['RANK']}.yaml")
    for layout in LAYOUTS:
        if layout.ranks != int(os.environ["WORLD_SIZE"]):
            continue
        num_steps = brief if layout.is_brief else NUM_STEPS
        rank, outcome = run_layout(layout, model, rollouts, config, num_steps=num_steps)
        if rank == 0:
            torch.save(outcome, out / f"{layout.name}.pt")
        parallel_state.destroy_model_parallel()
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
