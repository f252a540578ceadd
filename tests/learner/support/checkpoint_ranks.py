"""What the ranks of test_checkpoint.py do: train, save, load on other layouts, go on.

    torchrun --nproc_per_node N -m tests.learner.support.checkpoint_ranks MODEL ROLLOUTS OUT

Two ranks save after two steps, one of the layouts loads, saves the same again and does step 3; then
one rank does so too. Rank 0 writes `OUT/<kind>.<layout>.pt`: what step 3 gave, and every tensor of
the checkpoint that was saved right after loading.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_rl.errors import DataError
from megatron_rl.learner.batch.deal import deal_batch
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model import checkpoint
from megatron_rl.learner.model.checkpoint import load_checkpoint, save_checkpoint
from megatron_rl.learner.model.checkpoint_files import latest_checkpoint
from megatron_rl.learner.update.step import train_step
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.weights.geometry import read_geometry
from tests.learner import recorded
from tests.learner.support.exported import exported_weights
from tests.support.checkpoint_reader import read_tensors

NUM_UPDATES, WARMUP_STEPS, LEARNING_RATE = 6, 3, 1e-3
SAVED_AFTER = 2
OPTIMIZER = OptimizerConfig(
    learning_rate=LEARNING_RATE, warmup_steps=WARMUP_STEPS, decay="linear", weight_decay=0.01
)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2": (2, {}),
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A precision and an optimizer, and the layout that saves."""

    name: str
    dtype: str
    is_distributed: bool
    layout: str


KINDS = (
    Kind(name="float32", dtype="float32", is_distributed=False, layout="tp2"),
    Kind(name="float32_distributed", dtype="float32", is_distributed=True, layout="dp2"),
    Kind(name="bfloat16", dtype="bfloat16", is_distributed=False, layout="pp2"),
    Kind(name="bfloat16_distributed", dtype="bfloat16", is_distributed=True, layout="dp2"),
)


def build(kind: Kind, model: Path, parallel: Parallel, **settings: Any) -> Learner:
    """A learner fresh from the Hugging Face checkpoint."""
    return Learner(
        ModelConfig(path=str(model), dtype=kind.dtype),
        replace(OPTIMIZER, distributed=kind.is_distributed, **settings),
        read_geometry(model),
        parallel,
        num_updates=NUM_UPDATES,
    )


def train(
    learner: Learner, rollouts: Path, dual: DualVariable, steps: range
) -> list[dict[str, float]]:
    """The recorded steps; metrics of each."""
    reports = []
    for step in steps:
        batch = deal_batch(
            recorded.read_samples(rollouts, step, learner.parallel),
            learner.parallel,
            samples_per_prompt=recorded.NUM_SAMPLES,
            num_mini_batches=1,
            tokens_per_row=256,
        )
        report, _ = train_step(
            learner,
            batch,
            dual,
            ObjectiveConfig(),
            step=step,
            weight_version=step - 1,
            should_recompute=False,
        )
        reports.append(report.metrics)
    return reports


def outcome_of(learner: Learner, reports: list[dict[str, float]]) -> dict[str, Any]:
    """The last step's numbers, and the weights after it on rank 0."""
    return {"metrics": reports[-1], "weights": exported_weights(learner)}


def save(folder: Path, learner: Learner, dual: DualVariable, step: int, keep: int = 2) -> Path:
    """As the run does."""
    return save_checkpoint(
        folder, learner.trained, {"step": step, "dual": dual.state_dict()}, step=step, keep=keep
    )


def load(folder: Path, learner: Learner, dual: DualVariable) -> int:
    """As the run does; the step after which it was saved."""
    state = load_checkpoint(folder, learner.trained)
    dual.load_state_dict(state["dual"])
    return state["step"]


def contents(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, and how often the optimizer had stepped."""
    from megatron.core import dist_checkpointing

    tensors = read_tensors(folder)
    common = dist_checkpointing.load_common_state_dict(str(folder))["optimizer"]
    groups = common.get("param_groups") or common["optimizer"]["param_groups"]
    return {"tensors": tensors, "counts": [group["step"] for group in groups]}


def start(layout: str) -> Parallel:
    """Megatron's groups of the layout, in place of those that were there."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return initialize_parallel(ParallelConfig(**LAYOUTS[layout][1], timeout_seconds=60), seed=0)


def write(out: Path, name: str, outcome: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        torch.save(outcome, out / f"{name}.pt")


def save_first(kind: Kind, model: Path, rollouts: Path, out: Path) -> None:
    """Two steps, a checkpoint, and the third step of a run that is not interrupted."""
    parallel = start(kind.layout)
    learner, dual = build(kind, model, parallel), DualVariable(0.5)
    rates = [each["learner/learning_rate"] for each in train(learner, rollouts, dual, range(1, 3))]
    folder = save(out / kind.name, learner, dual, SAVED_AFTER)
    outcome = outcome_of(learner, train(learner, rollouts, dual, range(3, 4)))
    write(out, f"{kind.name}.uninterrupted", outcome | {"rates": rates, **contents(folder)})


def go_on(kind: Kind, layout: str, model: Path, rollouts: Path, out: Path) -> None:
    """Load on a layout, save what was loaded, and do the third step."""
    learner, dual = build(kind, model, start(layout)), DualVariable(0.1)
    step = load(out / kind.name / f"step_{SAVED_AFTER:06d}", learner, dual)
    again = save(out / f"{kind.name}_{layout}", learner, dual, step)
    outcome = outcome_of(learner, train(learner, rollouts, dual, range(step + 1, step + 2)))
    write(out, f"{kind.name}.{layout}", outcome | contents(again))


def change_settings(kind: Kind, model: Path, rollouts: Path, out: Path) -> None:
    """Go on with another learning rate and other betas than the checkpoint was made with."""
    learner = build(kind, model, start("tp1"), learning_rate=2 * LEARNING_RATE, betas=(0.8, 0.9))
    dual = DualVariable(0.1)
    load(out / kind.name / f"step_{SAVED_AFTER:06d}", learner, dual)
    reports = train(learner, rollouts, dual, range(3, 4))
    betas = [tuple(group["betas"]) for group in learner.trained.optimizer.param_groups]
    write(out, "changed", {"metrics": reports[0], "betas": betas})


def keep_some(kind: Kind, model: Path, out: Path) -> None:
    """Four checkpoints of which two are kept; then a run that starts over in the same folder."""
    learner, dual = build(kind, model, start("tp1")), DualVariable(0.1)
    folder, found = out / "kept", []
    for step in (1, 2, 3, 4, 2):
        save(folder, learner, dual, step, keep=2)
        names = sorted(path.name for path in folder.glob("*"))
        found.append((names, latest_checkpoint(folder).name))
    write(out, "kept", {"found": found})


def fill_the_disk(
    kind: Kind, layout: str, model: Path, rollouts: Path, out: Path, small_disk: Path
) -> None:
    """Save on a small disk that fills up while the parts are written, not before."""
    learner, dual = build(kind, model, start(layout)), DualVariable(0.1)
    train(learner, rollouts, dual, range(1, 2))
    save(small_disk, learner, dual, 1)
    checkpoint.BYTES_PER_PARAMETER = 0  # the estimate of what is needed would stop it earlier
    error = ""
    try:
        save(small_disk, learner, dual, 2)
    except DataError as caught:
        error = str(caught)
    dist.barrier()  # every rank came here: none hangs in the save
    fresh = build(kind, model, start(layout))
    step = load(latest_checkpoint(small_disk), fresh, dual)
    errors: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    names = sorted(path.name for path in small_disk.glob("*"))
    write(out, "full_disk", {"errors": errors, "step": step, "names": names})


def break_in_every_way(whole: Path, foreign: Path, folder: Path) -> None:
    """Copies of a checkpoint, each with another thing wrong."""

    def shard_of(copy: Path) -> Path:
        return sorted(copy.glob("*.distcp"))[0]

    def garble(path: Path) -> None:  # as long as before
        path.write_bytes(bytes(path.stat().st_size))

    def of_another_model(copy: Path) -> None:
        path = copy / checkpoint.STATE
        state = json.loads(path.read_text())
        state["made_by"]["hidden_size"] *= 2
        path.write_text(json.dumps(state))

    ways: dict[str, Callable[[Path], None]] = {
        "truncated": lambda copy: os.truncate(shard_of(copy), shard_of(copy).stat().st_size // 2),
        "no_common": lambda copy: (copy / "common.pt").unlink(),
        "no_state": lambda copy: (copy / checkpoint.STATE).unlink(),
        "garbled": lambda copy: garble(shard_of(copy)),
        "garbled_common": lambda copy: garble(copy / "common.pt"),
        "other_model": of_another_model,
    }
    for name, break_copy in ways.items():
        shutil.copytree(whole, folder / name)
        break_copy(folder / name)
    shutil.copytree(foreign, folder / "other_dtype")


def load_broken(kind: Kind, layout: str, model: Path, out: Path) -> None:
    """Try every folder; the message of each rank, by the folder's name."""
    parallel = start(layout)
    folder, step = out / "broken", f"step_{SAVED_AFTER:06d}"
    if parallel.rank == 0:
        break_in_every_way(out / kind.name / step, out / "bfloat16" / step, folder)
    dist.barrier()
    errors: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*")):
        error = ""
        try:
            load_checkpoint(path, build(kind, model, parallel).trained)
        except DataError as caught:
            error = str(caught)
        of_ranks: list[str] = [""] * parallel.world_size
        dist.all_gather_object(of_ranks, error)
        errors[path.name] = of_ranks
    write(out, "broken_errors", errors)


def main(model: Path, rollouts: Path, out: Path) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    for kind in KINDS:
        if world_size == 2:
            save_first(kind, model, rollouts, out)
        for layout, (ranks, _) in LAYOUTS.items():
            if ranks == world_size:
                go_on(kind, layout, model, rollouts, out)
    if world_size == 1:
        change_settings(KINDS[0], model, rollouts, out)
        keep_some(KINDS[0], model, out)
    else:
        load_broken(KINDS[0], "dp2", model, out)
        if (out / "small_disk").is_dir():
            fill_the_disk(KINDS[0], "dp2", model, rollouts, out, out / "small_disk")
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:]))
