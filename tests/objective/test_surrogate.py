import math

import pytest
import torch

from megatron_rl.errors import ConfigError
from megatron_rl.objective.loss import policy_loss
from megatron_rl.objective.normalize import normalized_sum
from megatron_rl.objective.surrogate import KINDS
from megatron_rl.observe.metrics import reduce


def _alone(tensor, _operation):
    return tensor


def logs(*values):
    return torch.tensor([math.log(value) for value in values])


def run(kind, policy, old, advantages, **settings):
    policy = policy.clone().requires_grad_()
    mask = torch.ones(len(policy), dtype=torch.bool)
    loss, metrics = policy_loss(policy, old, torch.tensor(advantages), mask, kind=kind, **settings)
    loss.sum().backward()
    return loss.tolist(), policy.grad.tolist(), reduce(metrics, _alone)


def test_gspo_worked_by_hand():
    # Sequence 0: ratios 4 and 1, geometric mean 2; sequence 1: 1/2.
    old = logs(0.1, 0.2, 0.4)
    policy = old + logs(4.0, 1.0, 0.5)
    ids = torch.tensor([0, 0, 1])
    loss, grad, metrics = run(
        "gspo", policy, old, [1.0, 1.0, 2.0], sequence_ids=ids, clip_low=0.6, clip_high=2.0
    )
    assert loss == pytest.approx([-2.0, -2.0, -1.0], rel=1e-6)
    assert grad == pytest.approx([-2.0, -2.0, -1.0], rel=1e-6)
    assert metrics["loss/ratio/max"] == pytest.approx(2.0)
    # With a clip at 1.5 the whole sequence stands still, the token of ratio 1 too.
    loss, grad, metrics = run(
        "gspo", policy, old, [1.0, 1.0, 2.0], sequence_ids=ids, clip_low=0.6, clip_high=0.5
    )
    assert loss == pytest.approx([-1.5, -1.5, -1.0], rel=1e-6)
    assert grad == pytest.approx([0.0, 0.0, -1.0], rel=1e-6)
    assert metrics["loss/clip_fraction_high/mean"] == pytest.approx(2 / 3)


def test_gspos_gradient_is_that_of_its_sequence_ratio():
    """With one advantage a sequence and the mean of sequences' means: mean of s_i A_i, by autograd
    through s_i = exp(mean log-ratio) itself.
    """
    torch.manual_seed(0)
    lengths, ids = (3, 5), torch.tensor([0] * 3 + [1] * 5)
    old = -torch.rand(8) * 3
    policy = (old + 0.3 * torch.randn(8)).requires_grad_()
    advantages = torch.tensor([1.5] * 3 + [-0.5] * 5)
    mask = torch.ones(8, dtype=torch.bool)
    loss, _ = policy_loss(
        policy, old, advantages, mask, kind="gspo", sequence_ids=ids, clip_low=0.9, clip_high=9.0
    )
    total, count = normalized_sum(loss, mask, ids, normalize="sequence_mean")
    (got,) = torch.autograd.grad(total / count, policy)
    ratios = [each.mean().exp() for each in (policy - old).split(lengths)]
    direct = -(1.5 * ratios[0] - 0.5 * ratios[1]) / 2
    (expected,) = torch.autograd.grad(direct, policy)
    assert torch.allclose(got, expected, rtol=1e-5)
    assert (total / count).item() == pytest.approx(direct.item(), rel=1e-6)


def test_cispo_worked_by_hand():
    # The weight is clipped to [0, 1.5], the log-prob keeps its gradient.
    old = logs(0.1, 0.4, 0.5)
    policy = old + logs(4.0, 0.25, 1.25)
    loss, grad, metrics = run("cispo", policy, old, [1.0, -2.0, 3.0], clip_low=1.0, clip_high=0.5)
    weights, advantages = (1.5, 0.25, 1.25), (1.0, -2.0, 3.0)
    assert grad == pytest.approx([-w * a for w, a in zip(weights, advantages)], rel=1e-6)
    values = [-w * a * p for w, a, p in zip(weights, advantages, policy.tolist())]
    assert loss == pytest.approx(values, rel=1e-6)
    assert metrics["loss/clip_fraction_high/mean"] == pytest.approx(1 / 3)
    assert metrics["loss/clip_fraction_low/mean"] == 0.0


def test_dppo_tv_worked_by_hand():
    # Moves of +0.3, +0.3, -0.3, -0.3 and a ratio of 100 that moved by 0.099 only.
    old = logs(0.2, 0.2, 0.5, 0.5, 0.001)
    policy = logs(0.5, 0.5, 0.2, 0.2, 0.1)
    loss, grad, metrics = run(
        "dppo_tv", policy, old, [1.0, -1.0, -1.0, 1.0, 1.0], clip_low=0.2, clip_high=0.2
    )
    assert loss == pytest.approx([0.0, 2.5, 0.0, -0.4, -100.0], rel=1e-5)
    assert grad == pytest.approx([0.0, 2.5, 0.0, -0.4, -100.0], rel=1e-5)
    assert metrics["loss/clip_fraction_high/mean"] == pytest.approx(1 / 5)
    assert metrics["loss/clip_fraction_low/mean"] == pytest.approx(1 / 5)


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_every_gradient_is_the_policy_gradient(kind):
    old = torch.tensor([-0.3, -2.0, -9.0, -1.0])
    advantages = [1.5, -0.25, 0.0, 2.0]
    ids = torch.tensor([0, 0, 1, 1])
    _, grad, metrics = run(
        kind, old, old, advantages, sequence_ids=ids, clip_low=0.2, clip_high=0.2
    )
    assert grad == [-each for each in advantages]
    assert metrics["loss/ratio/mean"] == 1.0
    assert metrics["loss/clip_fraction_high/mean"] == metrics["loss/clip_fraction_low/mean"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_masked_positions_are_exactly_zero_in_value_and_gradient(kind, broken):
    policy = torch.tensor([-0.5, broken, broken, -1.0], requires_grad=True)
    mask = torch.tensor([True, False, False, False])
    loss, metrics = policy_loss(
        policy,
        torch.tensor([-0.4, broken, -1.0, broken]),
        torch.tensor([1.0, broken, 1.0, broken]),
        mask,
        kind=kind,
        sequence_ids=torch.tensor([0, 0, 1, -1]),
        clip_low=0.2,
        clip_high=0.2,
    )
    loss.sum().backward()
    assert loss[1:].tolist() == policy.grad[1:].tolist() == [0.0] * 3
    assert policy.grad[0] != 0
    assert all(math.isfinite(value) for value in reduce(metrics, _alone).values())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_scale_value_and_gradient(kind):
    old, policy = logs(0.3, 0.5), logs(0.31, 0.45)
    settings = {"sequence_ids": torch.tensor([0, 1]), "clip_low": 0.2, "clip_high": 0.2}
    loss, grad, _ = run(kind, policy, old, [1.0, -1.0], **settings)
    weights = torch.tensor([2.0, 0.0])
    weighted, weighted_grad, _ = run(kind, policy, old, [1.0, -1.0], weights=weights, **settings)
    assert weighted == [2.0 * loss[0], 0.0]
    assert weighted_grad == [2.0 * grad[0], 0.0]


def test_unknown_kind_and_missing_ids():
    with pytest.raises(ConfigError, match=r"objective\.policy_loss"):
        run("ppo", logs(0.5), logs(0.5), [1.0], clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="sequence_ids"):
        run("gspo", logs(0.5), logs(0.5), [1.0], clip_low=0.2, clip_high=0.2)
