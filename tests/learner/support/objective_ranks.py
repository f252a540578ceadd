"""What the ranks of test_objectives.py do: the training step of step_ranks.py with a representative
set of objectives.

    torchrun --nproc_per_node N -m tests.learner.support.objective_ranks MODEL REFERENCE \\
        ROLLOUTS OUT

The recorded log-ratios of rollout and learner have a standard deviation of 0.3, so that bounds of
about e^0.3 take some tokens and leave others.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rl.config import (
    ConstraintConfig,
    ImportanceConfig,
    KLConfig,
    ObjectiveConfig,
    RejectionConfig,
    ScoreCenteringConfig,
)
from megatron_rl.learner.layout.parallel import Parallel
from tests.learner.support.step_ranks import DUAL_VALUE, Case, run_case, run_cases

DUAL = ConstraintConfig(initial=DUAL_VALUE)
REFERENCE = "REFERENCE"  # stands for the path
CENTERED = ScoreCenteringConfig(enabled=True)

OBJECTIVES = {
    "dapo_tis_rejection": ObjectiveConfig(
        clip_high=0.28,
        normalize="token_mean",
        constraint=DUAL,
        importance=ImportanceConfig(level="token", upper=1.3),
        rejection=RejectionConfig(divergence="k1", level="token", lower=0.6, upper=1.6),
    ),
    "gspo_k3": ObjectiveConfig(
        policy_loss="gspo",
        clip_low=3e-4,
        clip_high=4e-4,
        normalize="sequence_mean",
        constraint=replace(DUAL, gate="mean", tolerance=0.0005),
        importance=ImportanceConfig(level="sequence_mean", mode="mask", lower=0.94, upper=1.06),
        rejection=RejectionConfig(divergence="k3", level="sequence_mean", upper=0.05),
    ),
    "cispo_veto_token_gate": ObjectiveConfig(
        policy_loss="cispo",
        clip_low=1.0,
        clip_high=4.0,
        normalize="token_mean",
        entropy_coefficient=0.01,
        constraint=replace(DUAL, gate="token", max_discrepancy=0.004, tolerance=0.0005),
        rejection=RejectionConfig(veto_ratio=0.5),
    ),
    "bypass_dppo_penalty": ObjectiveConfig(
        policy_loss="dppo_tv",
        old_policy="rollout",
        clip_low=0.002,
        clip_high=0.002,
        normalize="token_mean",
        constraint=replace(DUAL, penalty="differentiable"),
        rejection=RejectionConfig(
            divergence="k2", level="sequence_max", upper=0.3, opsm_threshold=0.0
        ),
    ),
    "dr_grpo_batch_normalized": ObjectiveConfig(
        normalize="constant",
        normalize_length=32,
        constraint=replace(DUAL, gate="mean"),
        importance=ImportanceConfig(level="sequence_sum", upper=1.5, batch_normalize=True),
    ),
    "centered_rejection": ObjectiveConfig(
        constraint=replace(DUAL, baseline="batch"),
        rejection=RejectionConfig(divergence="k1", level="token", lower=0.6, upper=1.6),
    ),
    "kl_in_loss": ObjectiveConfig(
        constraint=DUAL, kl=KLConfig(coefficient=0.2, reference=REFERENCE)
    ),
    "kl_in_advantages": ObjectiveConfig(
        constraint=DUAL, kl=KLConfig(coefficient=0.2, estimator="k1", reference=REFERENCE)
    ),
    "decoupled_opsm": ObjectiveConfig(
        normalize="sequence_sum",
        constraint=DUAL,
        importance=ImportanceConfig(level="token", mode="mask", lower=0.7, upper=1.4),
        rejection=RejectionConfig(opsm_threshold=0.0),
    ),
    "cis_squared_ratio": ObjectiveConfig(
        normalize="sequence_mean",
        constraint=replace(DUAL, penalty="squared_ratio", measure="log_ratio", tolerance=0.01),
        importance=ImportanceConfig(level="token", mode="cis", cis_slope=0.3),
    ),
    "bypass_capped_squared_log_ratio": ObjectiveConfig(
        old_policy="rollout",
        clip_high=0.1,
        ratio_cap=1.2,
        constraint=replace(DUAL, penalty="squared_log_ratio", measure="ratio", tolerance=0.01),
    ),
    "score_centering_opsm": ObjectiveConfig(
        constraint=DUAL,
        importance=ImportanceConfig(level="token", mode="cis", cis_slope=0.3),
        rejection=RejectionConfig(opsm_threshold=0.0),
        score_centering=CENTERED,
    ),
    "score_centering_rejection": ObjectiveConfig(
        constraint=DUAL,
        importance=ImportanceConfig(level="token", upper=1.3, batch_normalize=True),
        rejection=RejectionConfig(divergence="k2", level="sequence_max", upper=0.3),
        score_centering=CENTERED,
    ),
    "all_rejected": ObjectiveConfig(
        constraint=DUAL,
        score_centering=CENTERED,
        rejection=RejectionConfig(divergence="k2", level="sequence_max", upper=1e-9),
    ),
}

NUM_MINI_BATCHES = {"cis_squared_ratio": 2, "score_centering_opsm": 2}
# What equal engines turn into the plain loss of the same name.
CORRECTED = tuple(name for name, config in OBJECTIVES.items() if not config.kl.reference)
PLAIN = "plain_"

LAYOUTS = (
    {},
    {"layout": "dp2"},
    {"layout": "dp2", "is_swapped": True},
    {"layout": "tp2"},
    {"layout": "cp2"},
    {"layout": "pp2", "tokens_per_row": 48},
    {"layout": "dp2", "is_packed": False, "tokens_per_row": 64},
    {"is_sparse": True},
    {"layout": "dp2", "is_sparse": True},
)
CASES = (
    *(
        Case(objective=name, num_mini_batches=NUM_MINI_BATCHES.get(name, 1), **how)
        for name in OBJECTIVES
        for how in LAYOUTS
        if not (how.get("is_sparse") and name in NUM_MINI_BATCHES)
    ),
    *(
        Case(objective=prefix + name, is_aligned=True)
        for name in CORRECTED
        for prefix in ("", PLAIN)
    ),
)


def objective_of(name: str, reference: Path) -> ObjectiveConfig:
    """Of that name; behind PLAIN, without constraint, weights, rejection and centering.

    Args:
        reference: the checkpoint of the reference policy.
    """
    config = OBJECTIVES[name.removeprefix(PLAIN)]
    if config.kl.reference:
        config = replace(config, kl=replace(config.kl, reference=str(reference)))
    if not name.startswith(PLAIN):
        return config
    return replace(
        config,
        constraint=ConstraintConfig(enabled=False),
        importance=ImportanceConfig(),
        rejection=RejectionConfig(),
        score_centering=ScoreCenteringConfig(),
    )


def main(model: Path, reference: Path, rollouts: Path, out: Path) -> None:
    def run(case: Case, parallel: Parallel) -> dict[str, Any]:
        config = objective_of(case.objective, reference)
        # The plain loss on the same rows: a head changes the rounding of gradients.
        has_heads = OBJECTIVES[case.objective.removeprefix(PLAIN)].score_centering.enabled
        return run_case(case, model, rollouts, parallel, config, has_heads=has_heads)

    run_cases(CASES, out, run)


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:]))
