import math

import pytest
import torch

from megatron_rl.errors import ConfigError
from megatron_rl.objective.regularizers import ESTIMATORS, reference_kl, reference_metrics
from megatron_rl.observe.metrics import reduce


def _alone(tensor, _operation):
    return tensor


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        # p_ref / p_theta = 2, so d = ln 2; dk/d log p_theta = -dk/dd.
        ("k1", -math.log(2), 1.0),
        ("k2", math.log(2) ** 2 / 2, -math.log(2)),
        ("k3", 1 - math.log(2), -1.0),
    ],
)
def test_worked_by_hand(estimator, value, gradient):
    policy = torch.tensor([math.log(0.2), math.nan], requires_grad=True)
    reference = torch.tensor([math.log(0.4), math.nan])
    mask = torch.tensor([True, False])
    kl = reference_kl(policy, reference, mask, estimator=estimator)
    kl.sum().backward()
    assert kl.tolist() == pytest.approx([value, 0.0], rel=1e-6)
    assert policy.grad.tolist() == pytest.approx([gradient, 0.0], rel=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_none(estimator):
    logprobs = torch.tensor([-0.1, -4.0])
    mask = torch.ones(2, dtype=torch.bool)
    assert reference_kl(logprobs, logprobs, mask, estimator=estimator).tolist() == [0.0, 0.0]


def test_metrics_over_the_kept_tokens():
    policy, reference = torch.tensor([0.5, 0.25, 0.1]).log(), torch.tensor([0.25, 0.5, 0.9]).log()
    mask = torch.tensor([True, True, False])
    metrics = reduce(reference_metrics(policy, reference, mask), _alone)
    assert metrics["reference/kl_k1/mean"] == pytest.approx(0.0, abs=1e-7)
    k3 = (0.5 - 1 + math.log(2) + 2 - 1 - math.log(2)) / 2
    assert metrics["reference/kl_k3/mean"] == pytest.approx(k3, rel=1e-6)
    assert reduce(reference_metrics(policy, reference, mask & False), _alone) == {}


def test_the_two_gradients_on_average_are_the_kls_and_nothing():
    """Over the policy's own distribution: k2's gradient is that of KL(theta || ref), k1's is 0."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64).requires_grad_()
    reference = torch.randn(7, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    everything = torch.ones(7, dtype=torch.bool)
    exact = (policy.exp() * (policy - reference)).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for estimator, gradient in (("k1", torch.zeros(7)), ("k2", expected)):
        values = reference_kl(policy, reference, everything, estimator=estimator)
        mean = (policy.exp().detach() * values).sum()
        (got,) = torch.autograd.grad(mean, logits, retain_graph=True)
        assert torch.allclose(got.float(), gradient.float(), atol=1e-6), estimator


def test_unknown_estimator():
    with pytest.raises(ConfigError, match=r"objective\.kl\.estimator"):
        reference_kl(torch.zeros(1), torch.zeros(1), torch.ones(1).bool(), estimator="k4")
