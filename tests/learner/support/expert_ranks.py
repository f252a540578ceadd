"""What the ranks of test_experts.py do: the training step of step_ranks.py with a mixture of
experts.

    torchrun --nproc_per_node N -m tests.learner.support.expert_ranks MODEL REFERENCE ROLLOUTS \\
        OUT [all]

`all`: every objective, not only some.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_rl.config.learner import MoeConfig
from megatron_rl.learner.layout.parallel import Parallel
from tests.learner.support.objective_ranks import NUM_MINI_BATCHES, OBJECTIVES, objective_of
from tests.learner.support.step_ranks import Case, run_case, run_cases

# Large enough to be a part of the gradient that no tolerance hides.
MOE = MoeConfig(load_balancing_coefficient=0.1, z_loss_coefficient=0.01)
# Smaller before a second mini-batch: the step of step_ranks.py follows the gradient, and a long one
# makes rounding errors grow.
REPLAYED = MoeConfig(
    load_balancing_coefficient=0.01, z_loss_coefficient=0.001, routing_replay="recomputed"
)
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"tokens_per_row": 48},
    {"layout": "ep2"},
    {"layout": "ep2", "is_packed": False, "tokens_per_row": 64},
    {"layout": "tp2_sp_ep2"},
    {"layout": "etp2"},
    {"layout": "cp2_ep2"},
    {"layout": "pp2", "tokens_per_row": 48},
)
FULL_RECOMPUTATION = ("tp2_sp_ep2", "pp2")
# One of each normalisation, three of them with a rejection; one with two mini-batches, the second
# of which is routed as in the separate pass; one with a reference policy, which is a mixture too.
SOME = (
    "dapo_tis_rejection",
    "gspo_k3",
    "dr_grpo_batch_normalized",
    "cis_squared_ratio",
    "kl_in_loss",
)
ALL = tuple(OBJECTIVES)


def cases_of(names: tuple[str, ...]) -> list[Case]:
    return [
        Case(objective=name, num_mini_batches=NUM_MINI_BATCHES.get(name, 1), **how)
        for name in names
        for how in LAYOUTS
    ]


def main(
    model: Path, reference: Path, rollouts: Path, out: Path, *, names: tuple[str, ...]
) -> None:
    def run(case: Case, parallel: Parallel) -> dict[str, Any]:
        config = objective_of(case.objective, reference)
        is_full = case.layout in FULL_RECOMPUTATION
        return run_case(
            case,
            model,
            rollouts,
            parallel,
            config,
            has_heads=config.score_centering.enabled,
            moe=REPLAYED if case.num_mini_batches > 1 else MOE,
            recomputation="full" if is_full else "none",
        )

    run_cases(cases_of(names), out, run)


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:5]), names=ALL if "all" in sys.argv[5:] else SOME)
