"""What the ranks of test_edges.py and test_restore_point.py do: mini-batches of which no rank keeps
a token, and updates that are taken back, in every layout of this world size; and every preset on
the batch of edge_batch.py.

    torchrun --nproc_per_node N -m tests.learner.support.edge_ranks MODEL ROLLOUTS OUT

Rank 0 writes, of all ranks, `OUT/<layout>.pt` and `OUT/<layout>.distributed.pt`: what each kind of
batch did to their state; `OUT/restored.<layout>.<dtype>.<optimizer>.pt`; and
`OUT/presets.<layout>.pt`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config import (
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RejectionConfig,
)
from megatron_rl.config.presets import PRESETS
from megatron_rl.learner.batch.deal import deal_batch
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.optimizer_parts import chained_optimizers
from megatron_rl.learner.model.restore_point import RestorePoint
from megatron_rl.learner.update.step import train_step
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.records import MicroBatch, Sample, StepReport, TrainBatch
from megatron_rl.weights.geometry import read_geometry
from tests.learner import recorded
from tests.learner.support import edge_batch
from tests.learner.support.breaking import (
    BROKEN,
    breaking,
    broken_sample,
    weights_problems,
)
from tests.learner.support.exported import exported_weights
from tests.support.layouts import LAYOUTS, names_of

SKIPPED = ("dp1", "dp2", "tp2", "cp2", "pp2")
WITH_RESTORE = (*SKIPPED, "pp2_vpp2")
WITH_PRESETS = ("dp1", "dp2")
# Whether the optimizer is distributed -> the dtypes in which updates are taken back. The main
# weights are those of the model, separate ones, or on every rank a part of separate ones.
RESTORED = {False: ("float32", "bfloat16"), True: ("bfloat16",)}
REJECT_ALL = ObjectiveConfig(
    rejection=RejectionConfig(divergence="k2", level="sequence_max", upper=1e-12)
)
# Weights that a step without a gradient would move: with momentum, decay and a schedule.
MOVING = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, warmup_steps=3, decay="linear")
# As in step_ranks.py: Adam that is SGD, so that weights after a step are as telling as gradients.
TELLING = OptimizerConfig(learning_rate=1.0, epsilon=1.0, clip_grad=0.0)


def build(
    model: Path, parallel: Parallel, optimizer: OptimizerConfig, dtype: str = "float32"
) -> Learner:
    """A learner fresh from the Hugging Face checkpoint."""
    config = ModelConfig(path=str(model), dtype=dtype)
    return Learner(config, optimizer, read_geometry(model), parallel, num_updates=8)


def state_of(learner: Learner) -> dict[str, torch.Tensor]:
    """Everything that an optimizer step changes on this rank."""
    trained = learner.trained
    state = {
        f"model.{number}.{name}": value
        for number, part in enumerate(trained.parts)
        for name, value in part.named_parameters()
    }
    numbers = [float(trained.scheduler.num_steps)]
    for number, part in enumerate(chained_optimizers(trained.optimizer)):
        for group in part.optimizer.param_groups:
            numbers += [group["lr"], group["weight_decay"], float(group.get("step", 0))]
            for index, parameter in enumerate(group["params"]):
                name = f"{number}.{len(state)}.{index}"
                state[f"main.{name}"] = parameter
                for key, value in part.optimizer.state[parameter].items():
                    state[f"{key}.{name}"] = value
    state["numbers"] = torch.tensor(numbers, dtype=torch.float64)
    return {name: value.detach().clone() for name, value in state.items()}


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """To the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def without_tokens(samples: Sequence[Sample], prompts: range) -> list[Sample]:
    """The samples, with the responses to the first so many prompts masked; by order of prompts."""
    first = min((each.prompt_index for each in samples), default=0)
    first -= first % recorded.NUM_PROMPTS  # of a step, whichever of its prompts are here
    changed = []
    for sample in samples:
        rollout, length = sample.rollout, len(sample.rollout.token_ids)
        if sample.prompt_index - first in prompts:
            rollout = replace(
                rollout,
                loss_mask=(False,) * length,
                rollout_logprobs=(0.0,) * length,
                weight_versions=(-1,) * length,
            )
        changed.append(replace(sample, rollout=rollout))
    return changed


def step(
    learner: Learner,
    samples: Sequence[Sample],
    dual: DualVariable,
    config: ObjectiveConfig,
    *,
    num_mini_batches: int = 1,
    should_recompute: bool = False,
) -> StepReport:
    batch = deal_batch(
        samples,
        learner.parallel,
        samples_per_prompt=recorded.NUM_SAMPLES,
        num_mini_batches=num_mini_batches,
        tokens_per_row=256,
    )
    report, _ = train_step(
        learner, batch, dual, config, step=1, weight_version=0, should_recompute=should_recompute
    )
    return report


def skipped(learner: Learner, other: Learner, rollouts: Path) -> dict[str, Any]:
    """What batches of which nothing is kept do to a learner that has momentum; and a step with one
    such mini-batch beside the same step without it, on `other`.
    """
    parallel, dual, dual_of_other = learner.parallel, DualVariable(0.1), DualVariable(0.1)
    config = ObjectiveConfig(entropy_coefficient=0.01)
    first, second, third = (
        recorded.read_samples(rollouts, number, parallel) for number in (1, 2, 3)
    )
    begins_equal = is_equal(state_of(learner), state_of(other))
    step(learner, first, dual, config)
    step(other, first, dual_of_other, config)
    found: dict[str, Any] = {"begins_equal": begins_equal, "kinds": {}}
    before = state_of(learner)
    constant = replace(REJECT_ALL, normalize="constant", normalize_length=8)
    masked = without_tokens(second, range(recorded.NUM_PROMPTS))
    # A response whose discrepancy is measured, so that lambda has its step.
    masked[-1:] = [replace(each, is_kept=False) for each in second[-1:]]
    for kind, samples, settings in (
        ("masked", masked, config),
        ("rejected", second, REJECT_ALL),
        ("rejected, constant", second, constant),
        ("left out", [replace(each, is_kept=False) for each in second], config),
    ):
        value = dual.value
        report = step(learner, samples, dual, settings)
        found["kinds"][kind] = {
            "is_untouched": is_equal(before, state_of(learner)),
            "metrics": report.metrics,
            "has_dual_step": dual.value != value,
        }
    found["broken"] = broken(learner, rollouts)
    found["weights"] = weights_problems(learner)
    dual.value = dual_of_other.value
    half = recorded.NUM_PROMPTS // 2
    report = step(learner, without_tokens(third, range(half)), dual, config, num_mini_batches=2)
    kept = [each for each in third if each.prompt_index % recorded.NUM_PROMPTS >= half]
    of_other = step(other, kept, dual_of_other, config)
    found["mixed"] = {
        "is_equal": is_equal(state_of(learner), state_of(other)),
        "has_moved": not is_equal(before, state_of(learner)),
        "metrics": report.metrics,
        "of_other": of_other.metrics,
        "dual": (dual.value, dual_of_other.value),
    }
    found["without advantages"] = without_advantages(learner, other, rollouts)
    return found


def without_advantages(learner: Learner, other: Learner, rollouts: Path) -> dict[str, Any]:
    """What a batch without a single advantage does to a learner whose penalty is bounded, beside
    `other`, which has no constraint; and what it does without the bound.
    """
    samples = recorded.read_samples(rollouts, 4, learner.parallel)
    samples = [replace(each, advantage=0.0) for each in samples]
    constraint = ObjectiveConfig().constraint
    bounded, off, free = (
        ObjectiveConfig(constraint=replace(constraint, **changes))
        for changes in ({"max_penalty_share": 0.1}, {"enabled": False}, {})
    )
    dual = DualVariable(0.5)
    report = step(learner, samples, dual, bounded, num_mini_batches=2)
    step(other, samples, DualVariable(0.5), off, num_mini_batches=2)
    found = {
        "is_equal": is_equal(state_of(learner), state_of(other)),
        "metrics": report.metrics,
        "dual": dual.value,
    }
    step(learner, samples, DualVariable(0.5), free, num_mini_batches=2)
    step(other, samples, DualVariable(0.5), off, num_mini_batches=2)
    found["is_equal_without_bound"] = is_equal(state_of(learner), state_of(other))
    return found


def broken(learner: Learner, rollouts: Path) -> dict[str, Any]:
    """What a number that is not finite, on one rank or in one sample, does to a learner that has
    momentum.
    """
    parallel, dual, config = learner.parallel, DualVariable(0.1), ObjectiveConfig()
    found: dict[str, Any] = {}
    for kind in BROKEN:
        before, value = state_of(learner), dual.value
        samples = recorded.read_samples(rollouts, 2, parallel)
        if kind.startswith("dropped"):  # and nothing else that could move the weights
            samples = [replace(each, is_kept=False) for each in samples]
        if samples and samples[0].prompt_index % recorded.NUM_PROMPTS == 0:
            samples[0] = broken_sample(samples[0], kind)
        should_recompute = kind == "recomputed logits"
        with breaking(kind, learner):
            report = step(learner, samples, dual, config, should_recompute=should_recompute)
        found[kind] = {
            "is_untouched": is_equal(before, state_of(learner)),
            "has_dual_step": dual.value != value,
            "problem": report.problem,
            "metrics": report.metrics,
        }
    return found


def restored(learner: Learner, other: Learner, rollouts: Path) -> list[dict[str, bool]]:
    """Updates of `learner` that are taken back, the first of a run and a later one; and how it goes
    on, beside `other`, which never took them.
    """
    point, config, found = RestorePoint(learner.trained), ObjectiveConfig(), []
    dual, dual_of_other = DualVariable(0.1), DualVariable(0.1)
    for number in (1, 2):
        taken_back, kept = (
            recorded.read_samples(rollouts, each, learner.parallel) for each in (number, number + 2)
        )
        before = state_of(learner)
        point.copy()
        step(learner, taken_back, DualVariable(0.1), config, num_mini_batches=2)
        has_moved = not is_equal(before, state_of(learner))
        point.restore()
        is_back = is_equal(before, state_of(learner))
        reports = [
            step(each, kept, of_each, config)
            for each, of_each in ((learner, dual), (other, dual_of_other))
        ]
        found.append(
            {
                "has_moved": has_moved,
                "is_back": is_back,
                "goes_on": is_equal(state_of(learner), state_of(other)),
                "reports_the_same": reports[0] == reports[1],
            }
        )
    return found


def with_distances(batch: TrainBatch, learner: Learner) -> TrainBatch:
    """The batch of edge_batch.py with log-probs at their distance from the learner's; without
    pipeline parallelism.
    """

    def row_with(row: MicroBatch) -> MicroBatch:
        [known] = learner.recompute([row])
        distance = torch.full_like(row.rollout_logprobs, edge_batch.NEAR_DISTANCE)
        distance[1::2] *= -1
        for number, sample in enumerate(row.samples):
            if edge_batch.kind_of(sample) == edge_batch.FAR:
                distance[row.sequence_ids == number] = -edge_batch.FAR_DISTANCE
        logprobs = torch.where(row.loss_mask, known.recomputed_logprobs + distance, 0.0)
        return replace(row, rollout_logprobs=logprobs.clamp(max=0.0))

    return replace(
        batch,
        mini_batches=tuple(tuple(map(row_with, rows)) for rows in batch.mini_batches),
        dropped=tuple(map(row_with, batch.dropped)),
    )


def run_preset(config: ObjectiveConfig, model: Path, parallel: Parallel) -> dict[str, Any]:
    """One step of a preset on the batch of edge_batch.py."""
    learner = build(model, parallel, TELLING)
    has_heads = config.score_centering.enabled
    samples = edge_batch.edge_samples(has_heads=has_heads) if parallel.is_replica_head else []
    if parallel.dp_size > 1:  # the first half of each mini-batch's prompts, and the rest
        own = (0, 3, 4) if parallel.dp_rank == 0 else (1, 2, 5)
        samples = [each for each in samples if each.prompt_index in own]
    batch = deal_batch(
        samples,
        parallel,
        samples_per_prompt=edge_batch.NUM_SAMPLES,
        num_mini_batches=edge_batch.NUM_MINI_BATCHES,
        tokens_per_row=edge_batch.TOKENS_PER_ROW,
    )
    batch = with_distances(batch, learner)
    report, rows = train_step(
        learner,
        batch,
        DualVariable(0.5),
        config,
        step=1,
        weight_version=0,
        should_recompute=False,
    )
    return {
        "report": report,
        "num_tokens": [
            sum(int(row.loss_mask.sum()) for row in rows) for rows in batch.mini_batches
        ],
        "num_left_out": batch.num_left_out,
        "num_rows": len(rows),
        "weights": exported_weights(learner),
    }


def gathered(outcome: Any, parallel: Parallel) -> list[Any]:
    of_ranks: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(of_ranks, outcome)
    return of_ranks


def main(model: Path, rollouts: Path, out: Path) -> None:
    from megatron.core import parallel_state

    for layout in names_of(int(os.environ["WORLD_SIZE"])):
        if layout not in WITH_RESTORE:
            continue
        parallel = initialize_parallel(LAYOUTS[layout].config(), seed=0)
        outcomes: dict[str, Any] = {}
        for is_distributed in (False, True):
            optimizer = replace(MOVING, distributed=is_distributed)
            if layout in SKIPPED:
                pair = [build(model, parallel, optimizer) for _ in range(2)]
                name = layout + (".distributed" if is_distributed else "")
                outcomes[name] = skipped(*pair, rollouts)
            for dtype in RESTORED[is_distributed]:
                pair = [build(model, parallel, optimizer, dtype) for _ in range(2)]
                kind = "distributed" if is_distributed else "plain"
                outcomes[f"restored.{layout}.{dtype}.{kind}"] = restored(*pair, rollouts)
        if layout in WITH_PRESETS:
            folder = out / f"{layout}.{parallel.rank}"
            folder.mkdir()
            configs = edge_batch.preset_configs(folder, iter(PRESETS))
            outcomes[f"presets.{layout}"] = {
                name: run_preset(config.objective, model, parallel)
                for name, config in configs.items()
            }
        for name, outcome in outcomes.items():
            of_ranks = gathered(outcome, parallel)
            if parallel.rank == 0:
                torch.save(of_ranks, out / f"{name}.pt")
        parallel_state.destroy_model_parallel()
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:]))
