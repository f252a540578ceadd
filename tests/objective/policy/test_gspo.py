import pytest
import torch

from megatron_rl.objective.inputs import LossInputs
from megatron_rl.objective.normalize import normalized_sum
from megatron_rl.objective.policy.gspo import surrogate
from megatron_rl.objective.policy_loss import policy_loss


def test_worked_by_hand(run_loss, logs):
    # Sequence 0: ratios 4 and 1, geometric mean 2; sequence 1: 1/2.
    old = logs(0.1, 0.2, 0.4)
    policy = old + logs(4.0, 1.0, 0.5)
    ids = torch.tensor([0, 0, 1])
    loss, grad, metrics = run_loss(
        "gspo", policy, old, [1.0, 1.0, 2.0], sequence_ids=ids, clip_low=0.6, clip_high=2.0
    )
    assert loss == pytest.approx([-2.0, -2.0, -1.0], rel=1e-6)
    assert grad == pytest.approx([-2.0, -2.0, -1.0], rel=1e-6)
    assert metrics["loss/ratio/max"] == pytest.approx(2.0)
    # With a clip at 1.5 the whole sequence stands still, the token of ratio 1 too.
    loss, grad, metrics = run_loss(
        "gspo", policy, old, [1.0, 1.0, 2.0], sequence_ids=ids, clip_low=0.6, clip_high=0.5
    )
    assert loss == pytest.approx([-1.5, -1.5, -1.0], rel=1e-6)
    assert grad == pytest.approx([0.0, 0.0, -1.0], rel=1e-6)
    assert metrics["loss/clip_fraction_high/mean"] == pytest.approx(2 / 3)


def test_the_gradient_is_that_of_the_sequence_ratio():
    """With one advantage a sequence and the mean of sequences' means: mean of s_i A_i, by autograd
    through s_i = exp(mean log-ratio) itself.
    """
    torch.manual_seed(0)
    lengths, ids = (3, 5), torch.tensor([0] * 3 + [1] * 5)
    old = -torch.rand(8) * 3
    policy = (old + 0.3 * torch.randn(8)).requires_grad_()
    advantages = torch.tensor([1.5] * 3 + [-0.5] * 5)
    mask = torch.ones(8, dtype=torch.bool)
    inputs = LossInputs.of(
        policy_logprobs=policy,
        old_logprobs=old,
        advantages=advantages,
        mask=mask,
        sequence_ids=ids,
        clip_low=0.9,
        clip_high=9.0,
        ratio_cap=0.0,
        dual_clip=0.0,
    )
    loss, _ = policy_loss(
        surrogate, inputs, weights=None, entropy=torch.zeros(8), old_policy="recomputed"
    )
    total, count = normalized_sum(loss, mask, ids, normalize="sequence_mean")
    (got,) = torch.autograd.grad(total / count, policy)
    ratios = [each.mean().exp() for each in (policy - old).split(lengths)]
    direct = -(1.5 * ratios[0] - 0.5 * ratios[1]) / 2
    (expected,) = torch.autograd.grad(direct, policy)
    assert torch.allclose(got, expected, rtol=1e-5)
    assert (total / count).item() == pytest.approx(direct.item(), rel=1e-6)


def test_dual_clip_and_cap_of_a_sequence_worked_by_hand(run_loss, logs):
    # Ratios 16 and 1, geometric mean 4, and advantages of -1: both tokens stop at 3, or weigh 3.
    old = logs(0.05, 0.2)
    policy, ids = old + logs(16.0, 1.0), torch.tensor([0, 0])
    settings = {"sequence_ids": ids, "clip_low": 0.2, "clip_high": 0.2}
    loss, grad, metrics = run_loss("gspo", policy, old, [-1.0] * 2, **settings, dual_clip=3.0)
    assert (loss, grad) == ([3.0, 3.0], [0.0, 0.0])
    assert metrics["loss/clip_fraction_dual/mean"] == 1.0
    loss, grad, metrics = run_loss("gspo", policy, old, [-1.0] * 2, **settings, ratio_cap=3.0)
    assert (loss, grad) == ([3.0, 3.0], [3.0, 3.0])
    assert metrics["loss/clip_fraction_cap/mean"] == 1.0
