"""What one rank finds about routers for test_experts.py, with losses of its own in place of an
objective's, and without changing a weight.

    python -m tests.learner.support.expert_single MODEL ROLLOUTS OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.config.learner import MoeConfig
from megatron_rl.learner.batch.deal import deal_batch
from megatron_rl.learner.batch.packing import fill, pack
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.routing import BalanceScales, Routes
from megatron_rl.learner.passes.forward import LossTerms, RowOutput
from megatron_rl.records import MicroBatch
from megatron_rl.weights.geometry import read_geometry
from tests.learner import recorded
from tests.learner.support.exported import exported_gradients

COUNT = 50  # of the loss contract, for each row
COEFFICIENT = 0.1
STEP = 0.001  # along the gradient, for the derivative of a loss


def build(
    model: Path, parallel: Parallel, recomputation: str = "none", replay: str = "recomputed"
) -> Learner:
    return Learner(
        ModelConfig(path=str(model), activation_recomputation=recomputation),
        OptimizerConfig(learning_rate=0.0, clip_grad=0.0),
        read_geometry(model),
        parallel,
        num_updates=1,
        moe=MoeConfig(routing_replay=replay),
    )


def loss_of_logprobs(factor: float) -> Callable[[int, RowOutput], LossTerms]:
    """A multiple of the sum of the row's log-probs."""

    def loss(_: int, output: RowOutput) -> LossTerms:
        total = factor * output.logprobs.sum()
        count = torch.tensor(COUNT, dtype=torch.int32)
        return LossTerms(total=total, count=count, num_kept=1, result=None)

    return loss


def update(
    learner: Learner, rows: Sequence[MicroBatch], factor: float, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradients of an update, and what its routers report."""
    learner.update(rows, loss_of_logprobs(factor), **settings)
    return exported_gradients(learner), learner.take_router_metrics()


def scales(rows: Sequence[MicroBatch], which: str) -> BalanceScales:
    """Those of one loss, as balance_scales() computes them."""
    samples = [sample for row in rows for sample in row.samples]
    number = len(samples)
    if which == "z_loss":
        number = sum(len(sample.rollout.token_ids) for sample in samples)
    factors = {"load_balancing": 0.0, "z_loss": 0.0}
    return BalanceScales(**factors | {which: COEFFICIENT * COUNT * len(rows) / number})


def derivative(learner: Learner, rows: Sequence[MicroBatch], which: str) -> dict[str, float]:
    """The slope of a loss along its own gradient, by differences and by the gradient; the experts
    of every token stay the same, as the shares of the experts have no gradient.
    """
    learner.recompute(rows, is_for_update=True)
    routes = dict(learner._routers._recorded)
    update(learner, rows, 0.0, balance=scales(rows, which))
    gradients = [
        (parameter, parameter.main_grad.clone())
        for module in learner.trained.modules
        for parameter in module.parameters()
    ]
    by_gradient = sum(float(each.double().square().sum()) for _, each in gradients) / COEFFICIENT
    values = []
    for sign in (1.0, -2.0, 1.0):  # there, to the other side, and back
        with torch.no_grad():
            for parameter, gradient in gradients:
                parameter.add_(gradient, alpha=sign * STEP / COEFFICIENT)
        learner._routers._recorded |= routes
        _, metrics = update(learner, rows, 0.0)
        values.append(metrics[f"router/{name_of(which)}/mean"] * learner.geometry.num_layers)
    by_differences = (values[0] - values[1]) / (2 * STEP / COEFFICIENT)
    return {"gradient": by_gradient, "differences": by_differences}


def name_of(which: str) -> str:
    return "load_balancing_loss" if which == "load_balancing" else which


def replays(model: Path, parallel: Parallel, rows: Sequence[MicroBatch]) -> dict[str, Any]:
    """The gradients with the learner's own routes, free and replayed, and with others."""
    found = {}
    for recomputation in ("none", "full", "selective"):
        learner = build(model, parallel, recomputation)
        free, _ = update(learner, rows, 1.0)
        learner.recompute(rows, is_for_update=True)
        routes = [dict(learner._routers._recorded[id(row)]) for row in rows]
        replayed, _ = update(learner, rows, 1.0)
        num_experts = learner.geometry.experts.num_experts
        for row, of_row in zip(rows, routes, strict=True):
            learner._routers._recorded[id(row)] = {
                layer: (ids + 1) % num_experts for layer, ids in of_row.items()
            }
        other, _ = update(learner, rows, 1.0)
        for row, of_row in zip(rows, routes, strict=True):
            learner._routers._recorded[id(row)] = {
                layer: torch.full_like(ids, -1) for layer, ids in of_row.items()
            }
        unknown, _ = update(learner, rows, 1.0)
        found[recomputation] = {
            "free": free,
            "replayed": replayed,
            "other": other,
            "unknown": unknown,
        }
    found["routes"] = routes
    return found


def with_routes(
    rows: Sequence[MicroBatch], routes: Sequence[Routes], change: int
) -> list[MicroBatch]:
    """The rows, packed anew of rollouts that hold the experts of all tokens but the last, each
    expert's number changed by so much.
    """
    found = []
    for row, of_row in zip(rows, routes, strict=True):
        every = torch.stack([of_row[layer] for layer in sorted(of_row)], 1).numpy()
        samples = []
        for start, sample in zip(row.cu_seqlens_padded.tolist(), row.samples, strict=False):
            length = len(sample.rollout.token_ids)
            own = (every[start : start + length - 1] + change) % 4
            samples.append(replace(sample, rollout=replace(sample.rollout, routes=own)))
        [again] = pack(samples, tokens_per_row=128, min_size=row.tokens.numel())
        found.append(again)
    return found


def follows_rollouts(
    model: Path, parallel: Parallel, rows: Sequence[MicroBatch], routes: Sequence[Routes]
) -> dict[str, Any]:
    """Gradients and recomputed log-probs with the experts of an engine that is the learner, and of
    one that is not.
    """
    found: dict[str, Any] = {}
    for recomputation in ("none", "full"):
        learner = build(model, parallel, recomputation, "rollout")
        found[recomputation] = {
            "free": update(learner, rows, 1.0)[0],
            "own": update(learner, with_routes(rows, routes, 0), 1.0)[0],
            "other": update(learner, with_routes(rows, routes, 1), 1.0)[0],
        }
    found["logprobs"] = [
        [row.recomputed_logprobs for row in learner.recompute(packed)]
        for packed in (rows, with_routes(rows, routes, 0), with_routes(rows, routes, 1))
    ]
    return found


def main(model: Path, rollouts: Path, out: Path) -> None:
    parallel = initialize_parallel(ParallelConfig(), seed=0)
    batch = deal_batch(
        recorded.read_samples(rollouts, 1, parallel),
        parallel,
        samples_per_prompt=recorded.NUM_SAMPLES,
        num_mini_batches=1,
        tokens_per_row=128,
    )
    rows = list(batch.mini_batches[0])
    learner = build(model, parallel)
    outcome: dict[str, Any] = {"derivatives": {}}
    for which in ("load_balancing", "z_loss"):
        outcome["derivatives"][which] = derivative(learner, rows, which)
    learner = build(model, parallel)
    _, outcome["metrics"] = update(learner, rows, 1.0)
    _, outcome["with_filler"] = update(learner, fill(rows, len(rows) + 2, 64), 1.0)
    _, outcome["nothing"] = update(learner, fill([], 1, 64), 1.0)
    outcome["num_tokens"] = sum(int((row.sequence_ids >= 0).sum()) for row in rows)
    outcome["num_positions"] = sum(row.tokens.numel() for row in rows)
    outcome["replays"] = replays(model, parallel, rows)
    routes = outcome["replays"]["routes"]
    outcome["rollouts"] = follows_rollouts(model, parallel, rows, routes)
    torch.save(outcome, out / "single.pt")
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:4]))
