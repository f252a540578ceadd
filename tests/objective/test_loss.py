import math

import pytest
import torch

from megatron_rl.objective.loss import policy_loss
from megatron_rl.observe.metrics import reduce


def _alone(tensor: torch.Tensor, _operation: str) -> torch.Tensor:
    return tensor


def _logs(*ratios: float) -> torch.Tensor:
    return torch.tensor([math.log(ratio) for ratio in ratios], requires_grad=True)


def test_clip_worked_by_hand():
    # Bounds 0.75 and 1.5. A clip acts where it lowers the surrogate: high ratio with a positive
    # advantage, low ratio with a negative one; the other two corners stay unclipped.
    policy = _logs(2.0, 2.0, 0.5, 0.5, 1.25)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 4.0])
    mask = torch.ones(5, dtype=torch.bool)
    loss, metrics = policy_loss(
        policy, torch.zeros(5), advantages, mask, clip_low=0.25, clip_high=0.5
    )
    assert loss.tolist() == pytest.approx([-3.0, 4.0, -1.0, 1.5, -5.0], rel=1e-6)
    loss.sum().backward()
    # Unclipped: d(-r A)/d logprob = -r A; clipped: 0.
    assert policy.grad.tolist() == pytest.approx([0.0, 4.0, -1.0, 0.0, -5.0], rel=1e-6)
    reduced = reduce(metrics, _alone)
    assert reduced["loss/clip_fraction_high/mean"] == pytest.approx(1 / 5)
    assert reduced["loss/clip_fraction_low/mean"] == pytest.approx(1 / 5)
    assert reduced["loss/ratio/mean"] == pytest.approx(6.25 / 5, rel=1e-6)
    assert reduced["loss/ratio/max"] == pytest.approx(2.0, rel=1e-6)
    assert reduced["loss/shaped_advantage/mean"] == pytest.approx(4 / 5)
    kl = (2 * (1 - math.log(2)) + 2 * (-0.5 + math.log(2)) + 0.25 - math.log(1.25)) / 5
    assert reduced["loss/update_kl/mean"] == pytest.approx(kl, rel=1e-5)


def test_before_the_first_step_the_gradient_is_the_policy_gradient():
    recomputed = torch.tensor([-0.3, -2.0, -9.0])
    policy = recomputed.clone().requires_grad_()
    advantages = torch.tensor([1.5, -0.25, 0.0])
    loss, metrics = policy_loss(
        policy, recomputed, advantages, torch.ones(3, dtype=torch.bool), clip_low=0.2, clip_high=0.2
    )
    loss.sum().backward()
    assert torch.equal(loss.detach(), -advantages)
    assert torch.equal(policy.grad, -advantages)
    reduced = reduce(metrics, _alone)
    assert reduced["loss/ratio/mean"] == 1.0
    assert reduced["loss/update_kl/mean"] == 0.0


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_masked_positions_are_exactly_zero_in_value_and_gradient(broken):
    policy = torch.tensor([-0.5, broken, broken, -1.0], requires_grad=True)
    recomputed = torch.tensor([-0.4, broken, -1.0, broken])
    advantages = torch.tensor([1.0, broken, 1.0, broken])
    mask = torch.tensor([True, False, False, False])
    loss, metrics = policy_loss(
        policy, recomputed, advantages, mask, clip_low=0.2, clip_high=0.2, entropy=advantages
    )
    loss.sum().backward()
    assert loss[1:].tolist() == [0.0, 0.0, 0.0]
    assert policy.grad[1:].tolist() == [0.0, 0.0, 0.0]
    assert policy.grad[0] != 0
    assert all(math.isfinite(value) for value in reduce(metrics, _alone).values())


def test_log_ratios_are_clamped():
    policy = torch.tensor([0.0, -900.0], requires_grad=True)
    recomputed = torch.tensor([-900.0, 0.0])
    advantages = torch.tensor([-1.0, 1.0])
    mask = torch.ones(2, dtype=torch.bool)
    loss, _ = policy_loss(policy, recomputed, advantages, mask, clip_low=0.2, clip_high=0.2)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.exp(20), -math.exp(-20)], rel=1e-6)
    assert policy.grad.tolist() == [0.0, 0.0]


def test_a_fully_masked_row_still_has_a_graph():
    policy = torch.zeros(3, requires_grad=True)
    mask = torch.zeros(3, dtype=torch.bool)
    loss, metrics = policy_loss(
        policy, torch.zeros(3), torch.ones(3), mask, clip_low=0.2, clip_high=0.2
    )
    loss.sum().backward()
    assert policy.grad.tolist() == [0.0, 0.0, 0.0]
    assert reduce(metrics, _alone) == {}


def test_entropy_is_reported_over_kept_tokens():
    _, metrics = policy_loss(
        torch.zeros(3),
        torch.zeros(3),
        torch.zeros(3),
        torch.tensor([True, True, False]),
        clip_low=0.2,
        clip_high=0.2,
        entropy=torch.tensor([1.0, 2.0, 99.0]),
    )
    assert reduce(metrics, _alone)["loss/entropy/mean"] == 1.5


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shaped_advantages"):
        policy_loss(
            torch.zeros(3),
            torch.zeros(3),
            torch.zeros(1),
            torch.ones(3, dtype=torch.bool),
            clip_low=0.2,
            clip_high=0.2,
        )
