"""What one rank alone can show: a batch without a kept token, the size of a checkpoint, an old
checkpoint that cannot be deleted, the learning-rate schedules, and the two kinds of log-probs under
truncation.

    torchrun --nproc_per_node 1 -m tests.learner.support.single_rank MODEL OUT

Writes `OUT/outcome.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_rl.errors import DataError, DivergenceError
from megatron_rl.learner.batch.packing import empty_micro_batch, pack
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model import checkpoint_writer
from megatron_rl.learner.model.build import build_model
from megatron_rl.learner.model.checkpoint_files import LATEST, latest_checkpoint
from megatron_rl.learner.model.optimizer import build_optimizer
from megatron_rl.learner.update.step import train_step
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.records import Rollout, Sample, TrainBatch, Truncation
from megatron_rl.weights.geometry import read_geometry
from tests.learner.support.saving import save_checkpoint

# (dtype, distributed optimizer) -> bytes a parameter
WEIGHTS = {
    ("float32", False): 12,
    ("float32", True): 16,
    ("bfloat16", False): 14,
    ("bfloat16", True): 14,
}
NUM_UPDATES, LEARNING_RATE = 8, 1e-2
SCHEDULES = {
    f"{decay}_{warmup}": OptimizerConfig(
        learning_rate=LEARNING_RATE, decay=decay, warmup_steps=warmup, weight_decay=0.1
    )
    for decay in ("constant", "linear", "cosine")
    for warmup in (0, 3)
}
TOP_K = 5


def edges(model: Path, out: Path, parallel: Parallel) -> dict[str, Any]:
    """An empty batch, and checkpoints, with every dtype and optimizer."""
    found: dict[str, Any] = {"sizes": {}}
    batch = TrainBatch(mini_batches=((empty_micro_batch(64),),), num_left_out=(0,), dropped=())
    for dtype, is_distributed in WEIGHTS:
        learner = Learner(
            ModelConfig(path=str(model), dtype=dtype),
            OptimizerConfig(distributed=is_distributed),
            read_geometry(model),
            parallel,
            num_updates=2,
        )
        try:
            train_step(
                learner,
                batch,
                DualVariable(0.1),
                ObjectiveConfig(),
                step=1,
                weight_version=0,
                should_recompute=False,
            )
        except DivergenceError as error:
            found["empty"] = str(error)
        folder = out / f"{dtype}_{is_distributed}"
        written = save_checkpoint(folder, learner.trained, {}, step=1, keep=1)
        found["sizes"][dtype, is_distributed] = (
            checkpoint_writer.bytes_per_parameter(learner.trained),
            sum(path.stat().st_size for path in written.iterdir()),
            sum(torch.Size(shape).numel() for _, shape in learner.tensor_shapes()),
        )
    (folder / "step_000000").touch()  # a file where a folder is expected
    try:
        save_checkpoint(folder, learner.trained, {}, step=2, keep=1)
    except DataError as error:
        found["stuck"] = str(error)
    found["latest"] = (folder / LATEST).read_text().strip()
    assert latest_checkpoint(folder) == folder / found["latest"]
    return found


def schedules(model: Path, parallel: Parallel) -> dict[str, Any]:
    """Learning rates of a whole run and weight decay of the parameter groups, by setting."""
    found = {}
    for name, config in SCHEDULES.items():
        built = build_model(
            ModelConfig(path=str(model)),
            read_geometry(model),
            parallel,
            config,
        )
        optimizer, scheduler = build_optimizer(config, built, num_updates=NUM_UPDATES)
        rates = []
        for _ in range(NUM_UPDATES):
            scheduler.step(1)
            rates.append([group["lr"] for group in optimizer.param_groups])
        decays = [
            (group["weight_decay"], sorted({parameter.dim() for parameter in group["params"]}))
            for group in optimizer.param_groups
        ]
        found[name] = {"rates": rates, "decays": decays}
    return found


def logprobs_by_truncation(model: Path, parallel: Parallel) -> dict[str, Any]:
    """Recomputed and full log-probs of one row, of a policy that truncates and of one that does
    not.
    """
    length = 40
    rollout = Rollout(
        token_ids=tuple(3 + 7 * place % 90 for place in range(length)),
        loss_mask=(False, *(True,) * (length - 1)),
        rollout_logprobs=(0.0,) * length,
        weight_versions=(-1, *(0,) * (length - 1)),
        finish_reason="stop",
        text="",
    )
    sample = Sample(prompt_index=0, sample_index=0, rollout=rollout, reward=0.0, advantage=0.0)
    rows = pack([sample], tokens_per_row=64)
    found = {}
    for name, truncation in (("whole", Truncation()), ("truncated", Truncation(top_k=TOP_K))):
        learner = Learner(
            ModelConfig(path=str(model)),
            OptimizerConfig(),
            read_geometry(model),
            parallel,
            num_updates=1,
            truncation=truncation,
        )
        [recomputed], [full] = learner.recompute(rows), learner.full_logprobs(rows)
        found[name] = {"recomputed": recomputed.recomputed_logprobs, "full": full.full_logprobs}
    return found


def main(model: Path, out: Path) -> None:
    parallel = initialize_parallel(ParallelConfig(timeout_seconds=60), seed=0)
    found = edges(model, out, parallel) | {
        "schedules": schedules(model, parallel),
        "logprobs": logprobs_by_truncation(model, parallel),
    }
    torch.save(found, out / "outcome.pt")
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:]))
