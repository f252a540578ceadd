from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megatron_rl.objective.inputs import LossInputs
from megatron_rl.objective.policy import policy_loss_named
from megatron_rl.objective.policy_loss import policy_loss
from megatron_rl.observe.metrics import reduce

RunLoss = Callable[..., tuple[list[float], list[float], dict[str, float]]]


@pytest.fixture
def run_loss() -> RunLoss:
    """`run_loss(name, policy, old, advantages, ...)`: the tokens' losses, gradients and metrics."""

    def run(
        name: str,
        policy: torch.Tensor,
        old: torch.Tensor,
        advantages: Sequence[float],
        *,
        clip_low: float,
        clip_high: float,
        ratio_cap: float = 0.0,
        dual_clip: float = 0.0,
        mask: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> tuple[list[float], list[float], dict[str, float]]:
        policy = policy.clone().requires_grad_()
        inputs = LossInputs.of(
            policy_logprobs=policy,
            old_logprobs=old,
            advantages=torch.tensor(advantages),
            mask=torch.ones(len(policy), dtype=torch.bool) if mask is None else mask,
            sequence_ids=torch.arange(len(policy)) if sequence_ids is None else sequence_ids,
            clip_low=clip_low,
            clip_high=clip_high,
            ratio_cap=ratio_cap,
            dual_clip=dual_clip,
        )
        loss, metrics = policy_loss(
            policy_loss_named(name),
            inputs,
            weights=weights,
            entropy=torch.zeros(len(policy)),
            old_policy="recomputed",
        )
        loss.sum().backward()
        reduced = reduce(metrics, lambda values, _operation: values)
        return loss.tolist(), policy.grad.tolist(), reduced

    return run


@pytest.fixture
def logs() -> Callable[..., torch.Tensor]:
    """Logarithms of its arguments, [N] float32."""

    def logarithms(*values: Any) -> torch.Tensor:
        return torch.tensor([math.log(value) for value in values])

    return logarithms
