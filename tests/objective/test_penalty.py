"""The differentiable penalties: numbers worked by hand, and the theory that they estimate."""

import math

import pytest
import torch

from megatron_rl.errors import ConfigError
from megatron_rl.objective.penalty import FORMS, differentiable_penalty

EVERY = torch.ones(5, dtype=torch.bool)
POLICY = torch.tensor([0.5, 0.25, 0.5, 0.9, 0.2])
ROLLOUT = torch.tensor([0.25, 0.5, 0.5, math.nan, 0.1])
MASK = torch.tensor([True, True, True, False, True])


@pytest.mark.parametrize(
    ("form", "values", "gradient"),
    [
        # sign(p - q) p: down where p_theta is above, up where it is below
        ("differentiable", [0.25, 0.25, 0, 0, 0.1], [0.5, -0.25, 0, 0, 0.2]),
        # 2 (p - q) p
        ("squared_difference", [0.0625, 0.0625, 0, 0, 0.01], [0.25, -0.125, 0, 0, 0.04]),
        # r = 2, 1/2, 1, 2: 2 (r - 1) r
        ("squared_ratio", [1, 0.25, 0, 0, 1], [4, -0.5, 0, 0, 4]),
        # 2 log r
        (
            "squared_log_ratio",
            [math.log(2) ** 2, math.log(2) ** 2, 0, 0, math.log(2) ** 2],
            [2 * math.log(2), -2 * math.log(2), 0, 0, 2 * math.log(2)],
        ),
    ],
)
def test_worked_by_hand(form, values, gradient):
    policy = POLICY.log().requires_grad_()
    penalty = differentiable_penalty(policy, ROLLOUT.log(), MASK, form=form)
    penalty.sum().backward()
    assert penalty.dtype == torch.float32
    assert penalty.tolist() == pytest.approx(values, rel=1e-5)
    assert policy.grad.tolist() == pytest.approx(gradient, rel=1e-5)
    # Exactly 0, not only nearly, where the mask is False or the probabilities are equal.
    assert penalty[2:4].tolist() == policy.grad[2:4].tolist() == [0.0, 0.0]


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy under gradient, and an engine's distribution near it, over five tokens."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(5, generator=generator, dtype=torch.float64)
    noise = torch.randn(5, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), (logits.detach() + 0.4 * noise).softmax(0)


def omega(form: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The penalties of App. B, written over the vocabulary."""
    if form == "squared_difference":
        return (q * (p - q) ** 2).sum()
    if form == "squared_ratio":
        return ((p - q) ** 2 / q).sum()
    return (q * (p / q).log() ** 2).sum()


def mean_over_engine(form: str, logits: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The expectation of the penalty of a token that the engine samples, summed exactly."""
    penalty = differentiable_penalty(logits.log_softmax(0), q.log(), EVERY, form=form)
    return (q * penalty).sum()


@pytest.mark.parametrize("form", ["squared_difference", "squared_ratio", "squared_log_ratio"])
def test_the_mean_over_the_engines_tokens_is_the_papers_omega(form):
    logits, q = distributions()
    expected = omega(form, logits.softmax(0), q)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    got = mean_over_engine(form, logits, q)
    (gradient,) = torch.autograd.grad(got, logits)
    assert got.dtype == torch.float64 and got.item() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)


def test_the_stationary_policy_of_the_squared_difference_is_the_papers():
    """Of max <p, A> - lambda * Omega_diff it is p_inf + (A - nu) / (2 lambda p_inf), where nu makes
    its sum 1 (App. B): the gradient of the estimate is 0 there, and not elsewhere.
    """
    _, q = distributions()
    advantages = torch.tensor([0.02, -0.01, 0.015, 0.0, -0.02], dtype=torch.float64)
    dual_value = 1.5
    nu = (advantages / q).sum() / (1 / q).sum()
    stationary = q + (advantages - nu) / (2 * dual_value * q)
    assert stationary.min() > 0 and stationary.sum().item() == pytest.approx(1, abs=1e-12)

    def gradient_at(p: torch.Tensor) -> torch.Tensor:
        logits = p.log().requires_grad_()
        gain = (logits.softmax(0) * advantages).sum()
        objective = gain - dual_value * mean_over_engine("squared_difference", logits, q)
        return torch.autograd.grad(objective, logits)[0]

    assert gradient_at(stationary).abs().max() < 1e-12
    assert gradient_at(q).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_finite_differences(form):
    logits, q = distributions()
    policy = logits.detach().log_softmax(0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logprobs: differentiable_penalty(logprobs, q.log(), EVERY, form=form), (policy,)
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_step_against_its_gradient_closes_the_gap(form):
    logits, rollout = torch.tensor([1.0, 0.2, -0.4], requires_grad=True), torch.tensor([-2.0])
    mask = torch.ones(1, dtype=torch.bool)
    first = last = math.inf
    for step in range(400):
        gap = differentiable_penalty(logits.log_softmax(0)[:1], rollout, mask, form=form).sum()
        (gradient,) = torch.autograd.grad(gap, logits)
        logits = (logits - 0.05 * gradient).detach().requires_grad_()
        first, last = (gap.item() if step == 0 else first), gap.item()
    assert last < 0.05 * first


@pytest.mark.parametrize("form", FORMS)
def test_far_and_masked_tokens_stay_finite(form):
    policy = torch.tensor([0.0, -300.0, math.nan, -math.inf], requires_grad=True)
    rollout = torch.tensor([-300.0, 0.0, -1.0, math.inf])
    mask = torch.tensor([True, True, False, False])
    penalty = differentiable_penalty(policy, rollout, mask, form=form)
    penalty.sum().backward()
    assert torch.isfinite(penalty).all() and torch.isfinite(policy.grad).all()
    assert penalty[2:].tolist() == policy.grad[2:].tolist() == [0.0, 0.0]
    empty = torch.zeros(0)
    assert differentiable_penalty(empty, empty, empty.bool(), form=form).shape == (0,)


def test_an_unknown_form():
    with pytest.raises(ConfigError, match="expected one of shaping, differentiable, squared_diff"):
        differentiable_penalty(POLICY.log(), ROLLOUT.log(), MASK, form="shaping")
