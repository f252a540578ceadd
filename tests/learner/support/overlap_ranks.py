"""What the ranks of test_offload.py do: the same recorded steps with and without overlapped
communication, and with the optimizer's state moved away while engines would be awake, by the
context of the loop (loop/rest.py).

    torchrun --nproc_per_node N -m tests.learner.support.overlap_ranks MODEL ROLLOUTS OUT

Rank 0 writes `OUT/<layout>.<variant>.pt`: exported weights after each step, and the metrics.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import Config, ModelConfig, OptimizerConfig
from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.checkpoint import load_checkpoint
from megatron_rl.learner.model.restore_point import RestorePoint
from megatron_rl.loop import rest
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.observe.stopwatch import Stopwatch
from megatron_rl.weights.geometry import read_geometry
from tests.learner import recorded
from tests.learner.support.saving import save_checkpoint
from tests.support.layouts import LAYOUTS

NUM_STEPS = 3
BUCKET = 30_000  # parameters: several buckets of the tiny model
# A rank's part of the distributed optimizer depends on the buckets, and with it the rounding of the
# gradient's norm: without clipping it does not reach the weights.
OPTIMIZER = {"learning_rate": 1e-2, "weight_decay": 0.1, "clip_grad": 0.0}
GRADIENTS = {"overlap_grad_reduce": True}
WEIGHTS = GRADIENTS | {"overlap_param_gather": True}
# Name -> (dtype, settings of the optimizer, whether its state is moved away between steps)
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain": ("float32", {}, False),
    "plain_overlap": ("float32", GRADIENTS, False),
    "plain_offload": ("float32", {}, True),
    "distributed": ("float32", {"distributed": True}, False),
    "distributed_overlap": ("float32", {"distributed": True} | WEIGHTS, False),
    "bfloat16": ("bfloat16", {"distributed": True}, False),
    "bfloat16_overlap": ("bfloat16", {"distributed": True} | WEIGHTS, False),
    "bfloat16_offload": ("bfloat16", {"distributed": True} | WEIGHTS, True),
}
OF_LAYOUT = {
    "dp2": tuple(VARIANTS),
    "cp2": ("distributed", "distributed_overlap"),
    "pp2_vpp2": ("plain", "plain_overlap", "plain_offload"),
    "cp2_pp2_vpp2": ("bfloat16", "bfloat16_overlap"),
}


def use_small_buckets() -> None:
    """As if the model were large."""
    from megatron.core import distributed

    config = distributed.DistributedDataParallelConfig
    distributed.DistributedDataParallelConfig = functools.partial(config, bucket_size=BUCKET)


def step_of(learner: Learner, rollouts: Path, step: int, dual: DualVariable) -> dict[str, float]:
    return recorded.train_on(learner, rollouts, step, dual, num_mini_batches=2, tokens_per_row=96)


def exported_weights(learner: Learner) -> dict[str, torch.Tensor]:
    """As they are published; on rank 0."""
    return {name: tensor.clone() for name, tensor in learner.full_tensors()}


def left_on_device(learner: Learner) -> int:
    """The bytes of gradients and moments where the learner computes."""
    buffers = [buffer.grad_data for part in learner.trained.parts for buffer in part.buffers]
    state = learner.trained.optimizer.chained_optimizers[0].optimizer.state
    moments = [value for of_parameter in state.values() for value in of_parameter.values()]
    tensors = filter(torch.is_tensor, (*buffers, *moments))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class Engines:
    """Colocated ones, which count what the learner has left of their memory when they wake up."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self.found: list[int] = []

    def fall_asleep(self, _sleep: object) -> None:
        """Nothing is freed here."""

    def wake_up(self, _wake: object) -> None:
        """The learner has left the device."""
        if self._learner.parallel.rank == 0:
            self.found.append(left_on_device(self._learner))


def run_variant(
    learner: Learner, fresh: Learner, rollouts: Path, out: Path, *, is_offloaded: bool
) -> Any:
    """In turns with engines: steps, before each of which another one is taken back, and a
    checkpoint, from which another learner goes on.
    """
    dual, found = DualVariable(0.1), []
    point, engines = RestorePoint(learner.trained), Engines(learner)
    rest.should_take_turns = lambda *_: is_offloaded  # as on a GPU
    asleep = functools.partial(
        rest.engines_asleep, engines, None, learner, Config(), Stopwatch().time
    )
    num_bytes = learner.offload() if is_offloaded else 0
    rest.make_room(learner, Config())
    for step in range(1, NUM_STEPS + 1):
        with asleep():
            point.copy()
            step_of(learner, rollouts, step + 1, DualVariable(0.1))
        with asleep():
            point.restore()
        with asleep():
            metrics = step_of(learner, rollouts, step, dual)
        found.append({"metrics": metrics, "weights": exported_weights(learner)})
    with asleep():
        is_same = goes_on(learner, fresh, rollouts, out)
    return {"steps": found, "num_bytes": num_bytes, "left": engines.found, "goes_on": is_same}


def goes_on(learner: Learner, fresh: Learner, rollouts: Path, folder: Path) -> bool:
    """Whether a learner that loads the checkpoint of another one does the same next step."""
    saved = save_checkpoint(folder, learner.trained, {}, step=1, keep=1)
    load_checkpoint(saved, fresh.trained)
    metrics = [
        step_of(each, rollouts, NUM_STEPS + 1, DualVariable(0.1)) for each in (learner, fresh)
    ]
    pair = [exported_weights(each) for each in (learner, fresh)]
    is_same = all(torch.equal(tensor, pair[1][name]) for name, tensor in pair[0].items())
    return metrics[0] == metrics[1] and is_same


def main(model: Path, rollouts: Path, out: Path) -> None:
    from megatron.core import parallel_state

    use_small_buckets()
    geometry = read_geometry(model)
    for layout, variants in OF_LAYOUT.items():
        if LAYOUTS[layout].ranks != int(os.environ["WORLD_SIZE"]):
            continue
        parallel = initialize_parallel(LAYOUTS[layout].config(), seed=0)
        for name in variants:
            dtype, settings, is_offloaded = VARIANTS[name]
            optimizer = OptimizerConfig(**OPTIMIZER, **settings)
            learner, fresh = (
                Learner(
                    ModelConfig(path=str(model), dtype=dtype),
                    optimizer,
                    geometry,
                    parallel,
                    num_updates=2 * NUM_STEPS + 2,
                )
                for _ in range(2)
            )
            folder = out / f"{layout}.{name}"
            outcome = run_variant(learner, fresh, rollouts, folder, is_offloaded=is_offloaded) | {
                "num_buckets": [len(part.bucket_groups) for part in learner.trained.parts],
            }
            if parallel.rank == 0:
                torch.save(outcome, out / f"{layout}.{name}.pt")
        parallel_state.destroy_model_parallel()
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:]))
