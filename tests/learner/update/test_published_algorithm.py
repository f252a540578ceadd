"""The preset `dc_grpo` is Alg. 1 of its paper: 20 steps of 4 mini-batches on recorded rollouts give
the loss, the gradients, the weights and lambda of `support/published.py`, which is plain torch in
float64 on transformers' model, within the rounding of float32.

Layouts that combine others take the first 3 steps; the slow run takes all 20 in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.rollout.recording import read_step
from tests.learner.support.comparison import (
    DISCREPANCY_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    relative_difference,
)
from tests.learner.support.published import Group, Response, Step, dc_grpo
from tests.learner.support.published_ranks import (
    ETA,
    LAYOUTS,
    NUM_MINI_BATCHES,
    NUM_STEPS,
    OPTIMIZER,
    TOLERANCE,
    Layout,
    recorded_step,
)
from tests.support.ranks import run_module

BRIEF = 3

Outcomes = dict[str, list[Any]]  # by layout: of every step its report, gradients and weights


def groups_of(folder: Path, step: int) -> Sequence[Group]:
    """The responses of a recorded step, by prompt."""
    return [
        [
            Response(
                tokens=rollout.token_ids,
                is_sampled=rollout.loss_mask,
                logprobs=rollout.rollout_logprobs,
                reward=score.reward,
            )
            for rollout, score in zip(each.group.rollouts, each.scores, strict=True)
        ]
        for each in read_step(folder, recorded_step(step))
    ]


@pytest.fixture(scope="module")
def published(
    tiny_checkpoint: Path, recorded_rollouts: Path
) -> list[tuple[Step, dict[str, torch.Tensor]]]:
    """Every step of the paper's algorithm, and the weights after it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).double()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.epsilon,
        weight_decay=OPTIMIZER.weight_decay,
    )
    steps = dc_grpo(
        model,
        optimizer,
        (groups_of(recorded_rollouts, step) for step in range(1, NUM_STEPS + 1)),
        num_mini_batches=NUM_MINI_BATCHES,
        initial=0.1,
        eta=ETA,
        c=TOLERANCE,
        bounds=(0.0, 10.0),
        eps_low=0.2,
        eps_high=0.24,
    )
    return [
        (step, {name: each.detach().clone() for name, each in model.named_parameters()})
        for step in steps
    ]


@pytest.fixture(
    scope="module",
    params=[BRIEF, pytest.param(NUM_STEPS, marks=pytest.mark.slow)],
    ids=["brief", "whole"],
)
def outcomes(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    recorded_rollouts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Outcomes]:
    """What the learner's ranks gave."""
    out = tmp_path_factory.mktemp("published")
    for world_size in (1, 2, 4):
        run_module(
            "tests.learner.support.published_ranks",
            tiny_checkpoint,
            recorded_rollouts,
            out,
            request.param,
            ranks=world_size,
        )
    names = [layout.name for layout in LAYOUTS]
    yield {name: torch.load(out / f"{name}.pt", weights_only=False)["steps"] for name in names}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_loss_gradients_weights_and_lambda_are_the_published_ones(
    layout: Layout,
    outcomes: Outcomes,
    published: list[tuple[Step, dict[str, torch.Tensor]]],
) -> None:
    steps = outcomes[layout.name]
    assert len(steps) >= (BRIEF if layout.is_brief else NUM_STEPS)
    for (report, gradients, weights), (step, expected_weights) in zip(steps, published):
        metrics = report.metrics
        assert abs(metrics["loss/mean"] - step.loss) <= LOSS_TOLERANCE
        assert abs(metrics["discrepancy/mean"] - step.mean_gap) <= 0.1 * DISCREPANCY_TOLERANCE
        assert abs(report.dual_value - step.dual_value) <= 0.1 * ETA * DISCREPANCY_TOLERANCE
        assert metrics["learner/grad_norm"] == pytest.approx(step.mean_norm, rel=1e-5)
        assert weights.keys() == expected_weights.keys()
        for name, tensor in expected_weights.items():
            assert relative_difference(weights[name], tensor) <= GRADIENT_TOLERANCE, name
        for name, tensor in step.gradients.items() if gradients is not None else ():
            assert relative_difference(gradients[name], tensor) <= GRADIENT_TOLERANCE, name


def test_the_steps_reach_every_branch_of_the_algorithm(outcomes: Outcomes) -> None:
    metrics = [report.metrics for report, _, _ in outcomes["dp1"]]
    duals = [report.dual_value for report, _, _ in outcomes["dp1"]]
    assert min(duals) == 0.0 and max(duals) > 1.0  # at the lower bound, and far above it
    assert any(each["loss/clip_fraction_high/mean"] > 0.01 for each in metrics)
    assert any(each["loss/clip_fraction_low/mean"] > 0.01 for each in metrics)
    assert {each["discrepancy/mean"] > TOLERANCE for each in metrics} == {True, False}
