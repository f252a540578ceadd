"""What the ranks of test_step.py do: one recorded batch through a real training step, in every
layout, row length, packing and normalisation that this world size allows.

    torchrun --nproc_per_node N -m tests.learner.support.step_ranks MODEL ROLLOUTS OUT

Rank 0 writes `OUT/<case>.pt`. Adam's epsilon is so large that it is SGD: one optimizer step takes
the gradient from the weights, so that weights after it are as telling as gradients.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config import (
    ConstraintConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_rl.config.learner import MoeConfig
from megatron_rl.learner.batch.deal import deal_batch
from megatron_rl.learner.batch.packing import fill, pack
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.passes.frozen import FrozenPolicy
from megatron_rl.learner.update.step import train_step
from megatron_rl.loop.state import initial_state
from megatron_rl.records import RecomputedRow, StepReport, TrainBatch
from megatron_rl.weights.geometry import read_geometry
from tests.learner import recorded
from tests.learner.support.exported import exported_gradients, exported_weights

DUAL_VALUE, TOLERANCE = 0.5, 0.0037


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to do the same step."""

    layout: str = "dp1"
    tokens_per_row: int = 256
    is_packed: bool = True  # False: every sequence in a row of its own
    normalize: str = "token_mean"
    objective: str = ""  # a name of objective_ranks.py, which then says how to normalise
    num_mini_batches: int = 1
    should_recompute: bool = False
    is_sparse: bool = False  # the batch of which one DP rank gets no kept token
    is_distributed: bool = False  # the optimizer
    is_swapped: bool = False  # two DP ranks hold each other's rows
    is_aligned: bool = False  # rollout log-probs are the learner's own

    @property
    def name(self) -> str:
        flags = (
            ("one_per_row", not self.is_packed),
            ("recompute", self.should_recompute),
            ("sparse", self.is_sparse),
            ("distributed", self.is_distributed),
            ("swapped", self.is_swapped),
            ("aligned", self.is_aligned),
        )
        parts = [
            self.layout,
            self.objective or self.normalize,
            f"{self.num_mini_batches}mb",
            str(self.tokens_per_row),
        ]
        return "-".join([*parts, *(flag for flag, is_set in flags if is_set)])

    @property
    def reference(self) -> str:
        """The case that it must agree with: one rank, long rows."""
        same = Case(
            normalize=self.normalize,
            objective=self.objective,
            num_mini_batches=self.num_mini_batches,
            is_sparse=self.is_sparse,
        )
        return same.name


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp1": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "cp2": (2, {"context": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2_sp_ep2": (2, {"tensor": 2, "sequence_parallel": True, "expert": 2}),
    "etp2": (2, {"expert_tensor": 2}),
    "cp2_ep2": (2, {"context": 2, "expert": 2}),
}
PLAIN_LAYOUTS = ("dp1", "dp2", "tp2", "pp2")
MODES = ("token_mean", "sequence_mean")
CASES = (
    *(
        Case(layout=layout, normalize=mode, num_mini_batches=number)
        for layout, mode, number in product(PLAIN_LAYOUTS, MODES, (1, 2))
    ),
    *(
        Case(layout=layout, normalize=mode, tokens_per_row=48)
        for layout, mode in product(("dp1", "dp2", "pp2"), MODES)
    ),
    *(
        Case(layout=layout, normalize=mode, is_packed=False, tokens_per_row=64)
        for layout, mode in product(("dp1", "dp2", "pp2"), MODES)
    ),
    *(
        Case(layout=layout, normalize=mode, is_sparse=True)
        for layout, mode in product(("dp1", "dp2", "cp2"), MODES)
    ),
    *(Case(layout=layout, should_recompute=True) for layout in PLAIN_LAYOUTS),
    *(Case(layout=layout, normalize=mode) for layout, mode in product(("tp2_sp", "cp2"), MODES)),
    Case(layout="dp2", is_distributed=True, num_mini_batches=2),
)


def deal(case: Case, rollouts: Path, parallel: Parallel, *, has_heads: bool) -> TrainBatch:
    """The batch of the case, as this rank's rows."""
    step = recorded.SPARSE_STEP if case.is_sparse else 1
    samples = recorded.read_samples(rollouts, step, parallel, has_heads=has_heads)
    return deal_batch(
        samples,
        parallel,
        samples_per_prompt=2 if case.is_sparse else recorded.NUM_SAMPLES,
        num_mini_batches=case.num_mini_batches,
        tokens_per_row=case.tokens_per_row,
    )


def one_per_row(batch: TrainBatch, tokens_per_row: int, parallel: Parallel) -> TrainBatch:
    """The same sequences on the same ranks, each in a row of its own."""
    mini_batches = []
    for rows in batch.mini_batches:
        samples = [sample for row in rows for sample in row.samples]
        packed = [
            pack([each], tokens_per_row=tokens_per_row, min_size=tokens_per_row)[0]
            for each in samples
        ]
        counts: list[Any] = [None] * parallel.world_size
        dist.all_gather_object(counts, len(packed))
        mini_batches.append(tuple(fill(packed, max(counts), tokens_per_row)))
    return replace(batch, mini_batches=tuple(mini_batches))


def mean_shaped_advantage(recomputed: Sequence[RecomputedRow], dual_value: float) -> float:
    """Mean |A'| of the kept tokens that this rank holds, by the definition."""
    values = []
    for each in recomputed:
        row, logprobs = each.micro_batch, each.recomputed_logprobs
        delta = (logprobs.double().exp() - row.rollout_logprobs.double().exp()).abs()
        shaped = row.advantages.double() - dual_value * delta
        values.append(shaped[row.loss_mask].abs())
    return float(torch.cat(values).mean()) if values else float("nan")


def swap(batch: TrainBatch, parallel: Parallel) -> TrainBatch:
    """The other one's of two DP ranks."""
    batches: list[Any] = [None, None]
    dist.all_gather_object(batches, batch, group=parallel.dp_group)
    return batches[1 - parallel.dp_rank]


def align(batch: TrainBatch, learner: Learner) -> TrainBatch:
    """As if the engine were the learner to the last bit; without pipeline parallelism."""
    return replace(
        batch,
        mini_batches=tuple(
            tuple(
                replace(
                    row.micro_batch,
                    rollout_logprobs=row.recomputed_logprobs,
                    rollout_head_logprobs=row.recomputed_head_logprobs,
                )
                for row in learner.recompute(rows)
            )
            for rows in batch.mini_batches
        ),
    )


def run_case(
    case: Case,
    model: Path,
    rollouts: Path,
    parallel: Parallel,
    config: ObjectiveConfig | None = None,
    *,
    has_heads: bool = False,
    moe: MoeConfig | None = None,
    recomputation: str = "none",
) -> dict[str, Any]:
    """One training step; what it did to everything."""
    if config is None:
        config = ObjectiveConfig(
            normalize=case.normalize,
            constraint=ConstraintConfig(initial=DUAL_VALUE, tolerance=TOLERANCE),
        )
    model_config = ModelConfig(path=str(model), activation_recomputation=recomputation)
    reference = None
    if config.kl.reference:
        reference = FrozenPolicy(config.kl.reference, model_config, parallel, temperature=1.0)
    learner = Learner(
        model_config,
        OptimizerConfig(
            learning_rate=1.0, epsilon=1.0, clip_grad=0.0, distributed=case.is_distributed
        ),
        read_geometry(model),
        parallel,
        num_updates=2,
        reference=reference and reference.full_logprobs,
        moe=moe,
    )
    batch = deal(case, rollouts, parallel, has_heads=has_heads)
    if not case.is_packed:
        batch = one_per_row(batch, case.tokens_per_row, parallel)
    if case.is_swapped:
        batch = swap(batch, parallel)
    if case.is_aligned:
        batch = align(batch, learner)
    report, recomputed = train_step(
        learner,
        batch,
        initial_state(config.constraint).dual,
        config,
        step=1,
        weight_version=0,
        should_recompute=case.should_recompute,
    )
    reports: list[StepReport | None] = [None] * parallel.world_size
    dist.all_gather_object(reports, report)
    kept = [int(sum(row.loss_mask.sum() for row in rows)) for rows in batch.mini_batches]
    of_ranks: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(of_ranks, (kept, [len(rows) for rows in batch.mini_batches]))
    gradients = None
    if not case.is_distributed:
        gradients = exported_gradients(learner)
    return {
        "reports": reports,
        "kept": [each for each, _ in of_ranks],
        "num_rows": [each for _, each in of_ranks],
        "shaped_advantage": mean_shaped_advantage(recomputed, DUAL_VALUE),
        "gradients": gradients,
        "weights": exported_weights(learner),
    }


def run_cases(
    cases: Sequence[Case], out: Path, run: Callable[[Case, Parallel], dict[str, Any]]
) -> None:
    """Those of this world size, a layout after the other; rank 0 writes what they gave."""
    from megatron.core import parallel_state

    world_size = int(os.environ["WORLD_SIZE"])
    for layout, (ranks, sizes) in LAYOUTS.items():
        if ranks != world_size:
            continue
        config = ParallelConfig(**sizes, timeout_seconds=60)
        parallel = initialize_parallel(config, seed=0)
        for case in cases:
            if case.layout == layout:
                outcome = run(case, parallel)
                if parallel.rank == 0:
                    torch.save(outcome, out / f"{case.name}.pt")
        parallel_state.destroy_model_parallel()
    shut_down_parallel()


def main(model: Path, rollouts: Path, out: Path) -> None:
    run_cases(CASES, out, lambda case, parallel: run_case(case, model, rollouts, parallel))


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:]))
