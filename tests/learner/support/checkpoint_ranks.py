"""What the ranks of test_checkpoint.py do: train, save, load on other layouts, go on.

    torchrun --nproc_per_node N -m tests.learner.support.checkpoint_ranks MODEL ROLLOUTS OUT [MODE]

Two ranks save after two steps. Then every layout of the kind's chain loads what the one before it
saved, saves the same again and does step 3; two ranks first, then four, then one. Rank 0 writes
`OUT/<kind>.<layout>.pt`: what step 3 gave, and every tensor of the checkpoint that was saved right
after loading.

With MODE `chain of all` the chain is of all layouts and of PAIR_KINDS, and nothing else is done;
afterwards, with `pairs`, every layout loads the checkpoints of all of them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config import ModelConfig, OptimizerConfig
from megatron_rl.errors import DataError
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model import checkpoint_writer
from megatron_rl.learner.model.checkpoint import load_checkpoint
from megatron_rl.learner.model.checkpoint_files import STATE, latest_checkpoint
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.weights.conversion.metadata import METADATA
from megatron_rl.weights.geometry import read_geometry
from tests.learner import recorded
from tests.learner.support.exported import exported_weights
from tests.learner.support.saving import save_checkpoint
from tests.support.checkpoint_reader import read_tensors
from tests.support.layouts import LAYOUTS, names_of

NUM_UPDATES, WARMUP_STEPS, LEARNING_RATE = 6, 3, 1e-3
SAVED_AFTER = 2
OPTIMIZER = OptimizerConfig(
    learning_rate=LEARNING_RATE, warmup_steps=WARMUP_STEPS, decay="linear", weight_decay=0.01
)
CHAIN = (
    "tp2",
    "tp2_sp",
    "cp2",
    "pp2",
    "pp2_vpp2",
    "pp2_uneven",
    "dp2",
    "tp4",
    "cp2_pp2_vpp2",
    "dp1",
)
SHORT_CHAIN = ("tp2_sp", "dp2", "pp2", "pp2_vpp2", "dp1")
CHAIN_OF_ALL = (*names_of(2), *names_of(4), *names_of(1))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A precision and an optimizer, and the layout that saves."""

    name: str
    dtype: str
    is_distributed: bool
    layout: str
    chain: tuple[str, ...] = CHAIN


KINDS = (
    Kind(name="float32", dtype="float32", is_distributed=False, layout="tp2"),
    Kind(
        name="float32_distributed",
        dtype="float32",
        is_distributed=True,
        layout="dp2",
        chain=SHORT_CHAIN,
    ),
    Kind(
        name="bfloat16",
        dtype="bfloat16",
        is_distributed=False,
        layout="pp2",
        chain=SHORT_CHAIN,
    ),
    Kind(name="bfloat16_distributed", dtype="bfloat16", is_distributed=True, layout="dp2"),
)
PAIR_KINDS = {kind.name: kind for kind in KINDS if kind.name in ("float32", "bfloat16_distributed")}


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
    return [
        recorded.train_on(learner, rollouts, step, dual, num_mini_batches=1, tokens_per_row=256)
        for step in steps
    ]


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
    return {"tensors": tensors, "counts": list(step_counts(common))}


def step_counts(state: Any) -> Iterator[int]:
    """Of every parameter group of an optimizer, or of several that are chained."""
    for key, value in state.items():
        if key == "param_groups":
            yield from (group["step"] for group in value)
        elif isinstance(value, dict):
            yield from step_counts(value)


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """The tensors of two checkpoints that are not the same bits. A vocabulary is padded to a
    multiple of 128 x TP, so that the rows behind the shorter one are zeros.
    """
    different = sorted(found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        one, other = found[name], expected[name]
        is_padded = "embedding" in name or "output_layer" in name
        if is_padded and len(one) != len(other):
            rows = min(len(one), len(other))
            if one[rows:].any() or other[rows:].any():
                different.append(name)
            one, other = one[:rows], other[:rows]
        if one.dtype != other.dtype or not torch.equal(one, other):
            different.append(name)
    return different


def start(layout: str) -> Parallel:
    """Megatron's groups of the layout, in place of those that were there."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return initialize_parallel(LAYOUTS[layout].config(), seed=0)


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


def folder_of(out: Path, kind: Kind, layout: str) -> Path:
    """The checkpoint that a layout saved right after it had loaded one."""
    return out / f"{kind.name}_{layout}" / f"step_{SAVED_AFTER:06d}"


def go_on(kind: Kind, layout: str, source: Path, model: Path, rollouts: Path, out: Path) -> None:
    """Load on a layout, save what was loaded, and do the third step."""
    learner, dual = build(kind, model, start(layout)), DualVariable(0.1)
    step = load(source, learner, dual)
    again = save(folder_of(out, kind, layout).parent, learner, dual, step)
    outcome = outcome_of(learner, train(learner, rollouts, dual, range(step + 1, step + 2)))
    write(out, f"{kind.name}.{layout}", outcome | contents(again))


def follow_the_chain(
    kind: Kind, chain: Sequence[str], model: Path, rollouts: Path, out: Path
) -> None:
    """The layouts of this world size, each with the checkpoint of the one before it."""
    source = out / kind.name / f"step_{SAVED_AFTER:06d}"
    for layout in chain:
        if LAYOUTS[layout].ranks == int(os.environ["WORLD_SIZE"]):
            go_on(kind, layout, source, model, rollouts, out)
        source = folder_of(out, kind, layout)


def load_all(kind: Kind, target: str, model: Path, out: Path) -> None:
    """The checkpoint of every layout on one, saved again beside the first one of all."""
    learner, dual = build(kind, model, start(target)), DualVariable(0.1)
    expected, found = read_tensors(out / kind.name / f"step_{SAVED_AFTER:06d}"), {}
    for source in LAYOUTS:
        step = load(folder_of(out, kind, source), learner, dual)
        again = save(out / "again", learner, dual, step)
        if learner.parallel.rank == 0:
            saved = contents(again)
            found[source] = (differences(saved["tensors"], expected), set(saved["counts"]))
        dist.barrier()
    write(out, f"{kind.name}.{target}.pairs", found)


def change_settings(kind: Kind, model: Path, rollouts: Path, out: Path) -> None:
    """Go on with another learning rate and other betas than the checkpoint was made with."""
    learner = build(kind, model, start("dp1"), learning_rate=2 * LEARNING_RATE, betas=(0.8, 0.9))
    dual = DualVariable(0.1)
    load(out / kind.name / f"step_{SAVED_AFTER:06d}", learner, dual)
    reports = train(learner, rollouts, dual, range(3, 4))
    betas = [tuple(group["betas"]) for group in learner.trained.optimizer.param_groups]
    write(out, "changed", {"metrics": reports[0], "betas": betas})


def keep_some(kind: Kind, model: Path, out: Path) -> None:
    """Four checkpoints of which two are kept; then a run that starts over in the same folder."""
    learner, dual = build(kind, model, start("dp1")), DualVariable(0.1)
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
    # The estimate of what is needed would stop it earlier.
    checkpoint_writer.BYTES_PER_PARAMETER = 0
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


class MakesFolder:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


def break_in_every_way(whole: Path, foreign: Path, folder: Path) -> None:
    """Copies of a checkpoint, each with another thing wrong."""

    def shard_of(copy: Path) -> Path:
        return sorted(copy.glob("*.distcp"))[0]

    def garble(path: Path) -> None:  # as long as before
        path.write_bytes(bytes(path.stat().st_size))

    def of_another_model(copy: Path) -> None:
        path = copy / STATE
        state = json.loads(path.read_text())
        state["made_by"]["hidden_size"] *= 2
        path.write_text(json.dumps(state))

    def with_code(copy: Path) -> None:
        """Unpickling its metadata runs a command."""
        path, state = copy / METADATA, json.loads((copy / STATE).read_text())
        path.write_bytes(pickle.dumps(MakesFolder(copy / "made_by_a_pickle")))
        state["bytes"][METADATA] = path.stat().st_size
        (copy / STATE).write_text(json.dumps(state))

    ways: dict[str, Callable[[Path], None]] = {
        "truncated": lambda copy: os.truncate(shard_of(copy), shard_of(copy).stat().st_size // 2),
        "no_common": lambda copy: (copy / "common.pt").unlink(),
        "no_state": lambda copy: (copy / STATE).unlink(),
        "garbled": lambda copy: garble(shard_of(copy)),
        "garbled_common": lambda copy: garble(copy / "common.pt"),
        "other_model": of_another_model,
        "hostile": with_code,
    }
    if not (whole / "common.pt").exists():  # Megatron-Core 0.19 writes none
        ways = {name: way for name, way in ways.items() if "common" not in name}
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


def main(model: Path, rollouts: Path, out: Path, mode: str = "") -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    if mode == "pairs":
        for kind in PAIR_KINDS.values():
            for target in names_of(world_size):
                load_all(kind, target, model, out)
        shut_down_parallel()
        return
    for kind in PAIR_KINDS.values() if mode else KINDS:
        if world_size == 2:
            save_first(kind, model, rollouts, out)
        follow_the_chain(kind, CHAIN_OF_ALL if mode else kind.chain, model, rollouts, out)
    if world_size == 1 and not mode:
        change_settings(KINDS[0], model, rollouts, out)
        keep_some(KINDS[0], model, out)
    elif world_size == 2 and not mode:
        load_broken(KINDS[0], "dp2", model, out)
        if (out / "small_disk").is_dir():
            fill_the_disk(KINDS[0], "dp2", model, rollouts, out, out / "small_disk")
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
