"""Score centering: numbers worked by hand for a vocabulary of 3, and the mean score over all tokens
that the engine could have sampled.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_rl.objective.importance import cis_bound, importance_weights
from megatron_rl.objective.inputs import LossInputs
from megatron_rl.objective.policy import policy_loss_named
from megatron_rl.objective.policy_loss import policy_loss
from megatron_rl.objective.score_centering import (
    HeadLogprobs,
    centering_coefficients,
    centering_term,
)
from megatron_rl.observe.metrics import reduce

# The engine, and the learner, of three tokens. The head is sorted by q: 2, then 0, then 1.
Q, P = (0.25, 0.25, 0.5), (0.5, 0.25, 0.25)
ADVANTAGE = 2.0
ORDER = (2, 0, 1)


def weights_of(mode: str, lower: float, upper: float):
    """f; for cis, `upper` is the slope."""

    def weights(old: torch.Tensor, rollout: torch.Tensor) -> torch.Tensor:
        found, _ = importance_weights(
            old,
            rollout,
            torch.ones_like(old, dtype=torch.bool),
            torch.zeros_like(old, dtype=torch.int64),
            level="token",
            mode=mode,
            lower=lower,
            upper=cis_bound(old, slope=upper, floor=5e-3) if mode == "cis" else upper,
        )
        return found

    return weights


IS = weights_of("truncate", 0.0, 1e9)
WEIGHTS = {
    "plain": None,
    "is": IS,
    "tis": weights_of("truncate", 0.0, 1.5),
    "mask": weights_of("mask", 0.4, 1.4),
    "cis": weights_of("cis", 0.0, 0.8),
}


def inputs_of(policy, old, advantages, *, mask=None) -> LossInputs:
    mask = torch.ones(len(policy), dtype=torch.bool) if mask is None else mask
    return LossInputs.of(
        policy_logprobs=policy,
        old_logprobs=old,
        advantages=advantages,
        mask=mask,
        sequence_ids=torch.zeros(len(policy), dtype=torch.int64),
        clip_low=0.2,
        clip_high=0.24,
        ratio_cap=0.0,
        dual_clip=0.0,
    )


def loss_of(surrogate, inputs: LossInputs, weights) -> torch.Tensor:
    entropy = torch.zeros_like(inputs.policy_logprobs)
    how = {"weights": weights, "entropy": entropy, "old_policy": "recomputed"}
    return policy_loss(surrogate, inputs, **how)[0]


def heads_of(policy, old, rollout) -> HeadLogprobs:
    is_present = torch.ones_like(rollout, dtype=torch.bool)
    return HeadLogprobs(is_present=is_present, policy=policy, old=old, rollout=rollout)


def coefficients(p, p_old, q, num_head, weights, *, loss="ppo_clip", order=ORDER, a=ADVANTAGE):
    """[K] c of one token; the sampled token's own log-probs do not enter."""
    head = list(order[:num_head])
    policy, old, rollout = (torch.tensor(each).log()[None, head] for each in (p, p_old, q))
    inputs = inputs_of(torch.zeros(1), torch.zeros(1), torch.tensor([a]))
    heads = heads_of(policy, old, rollout)
    return centering_coefficients(policy_loss_named(loss), inputs, heads, weights)[0].tolist()


@pytest.mark.parametrize(
    ("weights", "num_head", "expected"),
    [
        # K=1: Q_H = 1/2, P_H = 1/4, alpha = (1/2) / (3/4) = 2/3. By weight, c of token 2 is
        ("plain", 1, [1 / 3]),  # 1/2 - 2/3 * 1/4
        ("is", 1, [0.0]),  # 1/2 * 1/2 - 2/3 * 3/2 * 1/4
        ("tis", 1, [0.0]),  # the same: 1/2 and 3/2 are within the bound
        ("cis", 1, [0.0]),  # tokens of the rest are rare: their bound is 1.8
        ("mask", 1, [1 / 4]),  # 1/2 * 1/2, and 3/2 is outside the bounds
        # K=2: Q_H = P_H = 3/4, alpha = 1. c of tokens 2 and 0
        ("plain", 2, [1 / 4, -1 / 4]),  # 1/2 - 1/4, 1/4 - 1/2
        ("is", 2, [0.0, 0.0]),  # 1/2 * 1/2 - 1/4, 1/4 * 2 - 1/2
        ("tis", 2, [0.0, -1 / 8]),  # 1/4 * 3/2 - 1/2
        ("cis", 2, [0.0, -0.15]),  # the bound of token 0 is 1 + 0.8 / 2: 1/4 * 1.4 - 1/2
        ("mask", 2, [0.0, -1 / 2]),  # 2 is outside the bounds: 0 - 1/2
        # K=3: no rest. c of tokens 2, 0 and 1 is q f(p / q)
        ("plain", 3, [1 / 2, 1 / 4, 1 / 4]),
        ("is", 3, [1 / 4, 1 / 2, 1 / 4]),
        ("tis", 3, [1 / 4, 3 / 8, 1 / 4]),
        ("cis", 3, [1 / 4, 0.35, 1 / 4]),
        ("mask", 3, [1 / 4, 0.0, 1 / 4]),
    ],
)
def test_worked_by_hand(weights, num_head, expected):
    got = coefficients(P, P, Q, num_head, WEIGHTS[weights])
    assert got == pytest.approx([ADVANTAGE * each for each in expected], abs=1e-6)


def test_later_updates_worked_by_hand():
    # p_old = P; the update has moved the learner to p = (0.55, 0.25, 0.2), ratios 1.1, 1, 0.8.
    moved = (0.55, 0.25, 0.2)
    # K=2, plain: R_q = 1/4, R_p = 1/4, R_old = 1/4, so the rest's slope is A and alpha is 1:
    # c = q r - p = 1/2 * 0.8 - 0.2, 1/4 * 1.1 - 0.55
    got = coefficients(moved, P, Q, 2, None)
    assert got == pytest.approx([2 * 0.2, 2 * -0.275], abs=1e-6)
    # With A > 0 the upper bound of 1.24 stops a token of ratio 1.3, not one of 0.6.
    far = (0.65, 0.2, 0.15)
    # R_q = 1/4, R_p = 0.2, ratio of the rest 0.8, alpha = 1.25: alpha * slope = A
    got = coefficients(far, P, Q, 2, None)
    assert got == pytest.approx([2 * (0.5 * 0.6 - 0.15), 2 * (0.0 - 0.65)], abs=1e-6)
    # With A < 0 the lower bound of 0.8 stops the one of 0.6.
    got = coefficients(far, P, Q, 2, None, a=-2.0)
    assert got == pytest.approx([-2 * (0.0 - 0.15), -2 * (0.25 * 1.3 - 0.65)], abs=1e-6)


def test_equal_policies_are_not_corrected_at_all():
    for weights in WEIGHTS.values():
        for number in (1, 2):
            assert coefficients(P, P, P, number, weights) == [0.0] * number
    # Without a gap there is none to correct in later updates either: c = p_old r - p.
    assert coefficients((0.55, 0.25, 0.2), P, P, 2, None) == pytest.approx([0, 0], abs=1e-6)


def distributions(seed: int, size: int = 40, gap: float = 0.8):
    """Log-probs of engine, learner before the update and at it, and the logits of the last."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(size, generator=generator) * scale

    engine = noise(2.0)
    old = engine + noise(gap)
    return engine.log_softmax(0), old.log_softmax(0), old + noise(0.2)


def mean_gradient(rollout, old, logits, *, head, surrogate, weights, advantage=ADVANTAGE):
    """[V] the gradient of sum_a q[a] loss(a) to the learner's logits, and that of the loss without
    centering.
    """
    leaf = logits.double().requires_grad_()
    policy, size = leaf.log_softmax(0).float(), len(logits)
    advantages = torch.full((size,), advantage)
    # One row of V tokens: each has the same context, and samples another token.
    inputs = inputs_of(policy, old, advantages)
    weight = None if weights is None else weights(old, rollout)
    loss = loss_of(surrogate, inputs, weight)
    alike = [each[head].expand(size, -1) for each in (policy, old, rollout)]
    term, _ = centering_term(surrogate, inputs, heads_of(*alike), weights)
    chances = rollout.double().exp()
    [centered] = torch.autograd.grad((chances * (loss + term)).sum(), leaf, retain_graph=True)
    [plain] = torch.autograd.grad((chances * loss).sum(), leaf)
    return centered, plain


@pytest.mark.parametrize("loss", ["ppo_clip", "cispo", "dppo_tv"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_with_the_whole_distribution_the_mean_score_is_zero(loss, weights, advantage):
    """Also in later updates, where ratios differ from 1 and some are clipped."""
    largest = 0.0  # component of the mean gradient without centering
    for seed in range(5):
        rollout, old, logits = distributions(seed)
        for at in (old.clone(), logits):  # the first update, and a later one
            centered, plain = mean_gradient(
                rollout,
                old,
                at,
                head=slice(None),
                surrogate=policy_loss_named(loss),
                weights=WEIGHTS[weights],
                advantage=advantage,
            )
            assert centered.abs().max() < 1e-6
            largest = max(largest, float(plain.abs().max()))
    # Without bounds, importance sampling is centered by itself; bounds of the later update are not.
    assert largest > 1e-3 or (weights, loss) == ("is", "dppo_tv")


@pytest.mark.parametrize("weights", ["plain", "tis"])
def test_a_smaller_head_leaves_an_error_that_falls(weights):
    rollout, old, _ = distributions(0, size=400)
    order = rollout.argsort(descending=True)
    left = []
    for number in (8, 32, 128):
        centered, plain = mean_gradient(
            rollout,
            old,
            old.clone(),
            head=order[:number],
            surrogate=policy_loss_named("ppo_clip"),
            weights=WEIGHTS[weights],
        )
        left.append(float(centered.norm() / plain.norm()))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.3 * left[0] < 0.3


def test_the_engine_may_have_excluded_tokens():
    """A head of the whole support is exact, also where the learner has mass outside, and absent
    entries change nothing.
    """
    rollout, old, _ = distributions(3)
    order = rollout.argsort(descending=True)
    support, size = order[:6], len(old)
    chances = torch.zeros(size).double()
    chances[support] = rollout[support].log_softmax(0).double().exp()
    truncated = chances.log().float()
    leaf = old.double().requires_grad_()
    policy = leaf.log_softmax(0).float()
    inputs = inputs_of(policy, old, torch.ones(size))
    for num_absent in (0, 3):
        entries = torch.cat([support, support[:num_absent]])
        is_present = (torch.arange(6 + num_absent) < 6).expand(size, -1)
        of_head = [each[entries].expand(size, -1) for each in (policy, old, truncated)]
        of_head[2] = torch.where(is_present, of_head[2], -torch.inf)
        heads = HeadLogprobs(
            is_present=is_present, policy=of_head[0], old=of_head[1], rollout=of_head[2]
        )
        for weights in WEIGHTS.values():
            surrogate = policy_loss_named("ppo_clip")
            weight = None if weights is None else weights(old, truncated.clamp(min=-90))
            loss = loss_of(surrogate, inputs, weight)
            term, metrics = centering_term(surrogate, inputs, heads, weights)
            total = (chances * (loss + term)).sum()
            [gradient] = torch.autograd.grad(total, leaf, retain_graph=True)
            assert gradient.abs().max() < 1e-6
            assert reduce(metrics, lambda tensor, _: tensor)[
                "score_centering/head_mass/mean"
            ] == pytest.approx(1.0)


def test_masked_tokens_have_neither_term_nor_gradient():
    """Whatever stands in their heads."""
    policy = torch.tensor([[-0.1, -3.0], [torch.nan, -torch.inf]], requires_grad=True)
    bad = torch.tensor([[-0.2, -2.0], [torch.nan, torch.inf]])
    mask = torch.tensor([True, False])
    inputs = inputs_of(torch.zeros(2), torch.zeros(2), torch.tensor([2.0, torch.nan]), mask=mask)
    surrogate = policy_loss_named("ppo_clip")
    term, metrics = centering_term(surrogate, inputs, heads_of(policy, policy, bad), IS)
    term.sum().backward()
    assert term[1] == 0 and policy.grad[1].tolist() == [0.0, 0.0]
    figures = reduce(metrics, lambda tensor, _: tensor)
    assert figures["score_centering/head_mass/mean"] == pytest.approx(0.8187308 + 0.1353353)
    nothing = torch.zeros(2, 0)
    for is_kept in (True, False):
        empty = inputs_of(torch.zeros(2), torch.zeros(2), torch.ones(2), mask=mask & is_kept)
        term, metrics = centering_term(surrogate, empty, heads_of(*[nothing] * 3), None)
        assert term.tolist() == [0.0, 0.0]
        assert all(metric.sum == 0 for metric in metrics.values())


def test_the_gradient_of_a_token_is_its_advantage_times_the_coefficients():
    # K=2, plain, from above: c = A (1/4, -1/4); the value stays that of the surrogate
    policy, rollout = (torch.tensor(each).log()[None, [2, 0]] for each in (P, Q))
    policy.requires_grad_()
    inputs = inputs_of(torch.zeros(1), torch.zeros(1), torch.tensor([ADVANTAGE]))
    surrogate = policy_loss_named("ppo_clip")
    term, metrics = centering_term(surrogate, inputs, heads_of(policy, policy, rollout), None)
    term.sum().backward()
    assert term.item() == 0
    assert policy.grad[0].tolist() == pytest.approx([0.5, -0.5])
    figures = reduce(metrics, lambda tensor, _: tensor)
    assert figures["score_centering/size/mean"] == pytest.approx(1.0)
    assert figures["score_centering/head_mass/mean"] == pytest.approx(0.75)


@pytest.mark.parametrize("q_rest", [0.0, 1e-8, 0.3])
def test_a_rest_of_the_learner_that_is_empty_gives_no_infinite_factor(q_rest):
    q, p = (1 - q_rest, q_rest), (1 - 1e-9, 1e-9)
    call = partial(coefficients, p, p, q, 1, order=(0, 1))
    for weights in (None, IS):
        assert all(abs(each) <= 2 * ADVANTAGE for each in call(weights))
