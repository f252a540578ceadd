"""What counts as a number that is not finite, and what does not: a thousand clean steps of any
size raise no alarm.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rl.learner.learner import LARGEST_GRADIENT, Learner
from megatron_rl.objective.discrepancy import check_logprobs


def problem_of(*gradients: torch.Tensor) -> str:
    """Of a rank whose gradient lies in these buffers; the last one is of experts."""
    buffers = [SimpleNamespace(grad_data=each) for each in gradients]
    part = SimpleNamespace(buffers=buffers[:-1], expert_parallel_buffers=buffers[-1:])
    learner = SimpleNamespace(
        trained=SimpleNamespace(parts=[part]), parallel=SimpleNamespace(rank=3)
    )
    return Learner._gradient_problem(learner)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e30"])
@pytest.mark.parametrize("buffer", [0, 1])
@pytest.mark.parametrize("position", [0, 500, 998])
def test_one_number_of_a_gradient_is_enough(value: str, buffer: int, position: int) -> None:
    gradients = [torch.randn(999), torch.randn(999)]
    assert problem_of(*gradients) == ""
    gradients[buffer][position] = float(value)
    problem = problem_of(*gradients)
    assert problem.startswith("rank 3: expected a finite gradient")


def test_a_thousand_clean_steps_raise_no_alarm() -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(1_000):
        size = 10.0 ** (step % 40 - 28)  # 1e-28 to 1e11
        gradient = size * torch.randn(512, generator=generator)
        assert problem_of(gradient, torch.zeros(0 if step % 2 else 8)) == "", step
        logprobs = -torch.rand(256, generator=generator) * 10.0 ** (step % 7 - 3)
        logprobs[:2] = torch.tensor([0.0, -9_000.0])
        check_logprobs(logprobs, torch.rand(256, generator=generator) < 0.9)
    assert problem_of(torch.full((4,), LARGEST_GRADIENT), torch.zeros(1)) == ""
    assert problem_of() == ""
