"""Puts numbers that are not finite into the samples, passes and weights of edge_ranks.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from megatron_rl.learner import learner as learner_module
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.passes import forward as forward_module
from megatron_rl.records import Sample

# Logits of one rank: in the update, in a separate pass before it, and of dropped samples.
LOGITS = ("logits", "recomputed logits", "dropped logits")
BROKEN = ("rollout log-prob", "advantage", "gradient", "dropped sample", *LOGITS)


def weights_problems(learner: Learner) -> list[str]:
    """What is told of sound weights, and of a weight of the last rank that is not finite."""
    weight = list(learner.trained.modules[-1].parameters())[-1]
    found = [learner.weights_problem()]
    before = weight.detach().clone()
    for value in (float("nan"), float("-inf")):
        if learner.parallel.rank == learner.parallel.world_size - 1:
            weight.data.view(-1)[-1] = value
        found.append(learner.weights_problem())
        weight.data.copy_(before)
    return found


def broken_sample(sample: Sample, kind: str) -> Sample:
    """The sample with a NaN, or a reward's advantage that is infinite."""
    rollout = sample.rollout
    if kind in ("rollout log-prob", "dropped sample"):
        logprobs = list(rollout.rollout_logprobs)
        logprobs[list(rollout.loss_mask).index(True)] = float("nan")
        return replace(sample, rollout=replace(rollout, rollout_logprobs=tuple(logprobs)))
    return replace(sample, advantage=float("inf")) if kind == "advantage" else sample


@contextmanager
def nan_gradient(learner: Learner) -> Iterator[None]:
    """A number of the last rank's gradient is NaN after the pass, and none of another rank's."""
    run = learner_module.run_schedule

    def run_and_break(*arguments: Any, **settings: Any) -> Any:
        results = run(*arguments, **settings)
        if learner.parallel.rank == learner.parallel.world_size - 1:
            learner.trained.parts[0].buffers[0].grad_data[0] = float("nan")
        return results

    learner_module.run_schedule = run_and_break
    try:
        yield
    finally:
        learner_module.run_schedule = run


@contextmanager
def nan_logits(learner: Learner) -> Iterator[None]:
    """A logit of one rank is NaN in every pass, and none of another rank's. It is the last rank, or
    with TP the first of the last ranks, since the others hold only padding of the small vocabulary.
    """
    compute, parallel = forward_module.support_logprobs, learner.parallel
    is_broken = parallel.rank == parallel.world_size - parallel.tp_size

    def break_and_compute(logits: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        if is_broken and logits.numel():
            logits = logits.clone()
            logits.data[0, 0] = float("nan")
        return compute(logits, *arguments, **settings)

    forward_module.support_logprobs = break_and_compute
    try:
        yield
    finally:
        forward_module.support_logprobs = compute


def breaking(kind: str, learner: Learner) -> AbstractContextManager[None]:
    """What breaks the passes of this kind, apart from `broken_sample`."""
    if kind == "gradient":
        return nan_gradient(learner)
    return nan_logits(learner) if kind in LOGITS else nullcontext()
