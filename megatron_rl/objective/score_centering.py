"""Score centering (arXiv 2609.20807): subtracts from the score of a sampled token its mean under
the engine, so that the mean advantage moves the policy nowhere.

The engine samples token a with probability q[a], the learner differentiates log p[a]. For q != p
the mean score, sum_v q[v] grad log p[v], is not 0, and the gradient contains E[A] times that mean:
a drift that adds up over the steps. The loss of a token with weight w[a] = f(p[a] / q[a]) becomes

    -A (w[a] log p[a] - sum_v q[v] w[v] log p[v])       A, w, q without gradient

whose gradient has mean 0 over a ~ q for a constant A, whatever f is.

**The head.** The engine sends q for the K likeliest tokens, the head H. The others, the rest, have
the masses R_q = 1 - sum_H q and R_p = 1 - sum_H p and are taken to have one ratio, q[v] / p[v] =
alpha = R_q / R_p. Because the scores of all tokens add up to 0 under p, the rest needs no term of
its own:

    sum_{v not in H} p[v] alpha f(1/alpha) grad log p[v]
        = -alpha f(1/alpha) sum_{v in H} p[v] grad log p[v]

so the loss gains the gradient of A sum_H c[v] log p[v], where

    c[v] = q[v] f(p[v] / q[v]) - alpha f(1/alpha) p[v]

Where the head holds every token that the engine could have sampled, R_q is 0 and the sum is exact;
the rest then has no term, also if p has mass outside. For f(r) = r, importance sampling without a
bound, every c[v] is 0 up to that: the mean score is that of p already.

**Several updates.** In the updates of a step the sampled token's part of the loss is not w log p
but the surrogate w S(p[a] / p_old[a], A), where w = f(p_old / q) and p_old is the learner before
the first update. Its gradient is w[a] s(a) grad log p[a] with the slope

    s(v) = d S(p[v] / p_old[v], A) / d log p[v]

which is A in the first update (p = p_old), A p / p_old in the later ones where no bound acts, and 0
where PPO's clip holds the token. What must be subtracted is the mean of exactly this, so

    c[v] = q[v] f(p_old[v] / q[v]) s(v) - (R_q / R_p) f(R_old / R_q) s(rest) p[v]

with p_old of the head from the separate forward pass that several updates need anyway. With p in
the place of p_old and without the ratio, the mean would be wrong in every update but the first:
even for q = p_old, where the mean of p / p_old grad log p is 0, it would subtract
sum_v p_old[v] grad log p[v], which is not. The slope is taken from the surrogate by autograd, so
that clips, caps and trust regions hold for the tokens of the head as for the sampled ones.

Everything is per token: a loss, weight or rejection of whole sequences has no mean over the tokens
that could have been sampled at one position (config/objective.py refuses them), except for
selecting whole sequences, which removes both parts of a token's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_rl.objective.inputs import LossInputs, PolicyLoss
from megatron_rl.observe.metrics import Mean, Metric

# A rest of less mass than this is taken to be empty: 1 minus a sum of float32 probabilities has no
# digits left there.
MIN_REST = 1e-6
# R_q / R_p is at most this. The gradient of a larger one would have an error of 1e-7 times it.
MAX_REST_RATIO = 1e3
# The log-prob that a token of the rest is given where its ratio alone should count: a rare one.
RARE = -30.0

# From old and rollout log-probs [N], the weights [N] of tokens.
TokenWeights = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLogprobs:
    """Log-probs of the head's tokens at each token of a row under three policies.

    Example of one token and K=2, whose engine could have sampled only one: `HeadLogprobs(
    is_present=[[True, False]], policy=[[-0.3, 0.0]], old=[[-0.3, 0.0]], rollout=[[0.0, -inf]])`.
    Values where `is_present` is False have no effect.
    """

    is_present: torch.Tensor  # [T, K] bool
    policy: torch.Tensor  # [T, K] float32, under gradient: the learner's at this update
    old: torch.Tensor  # [T, K] float32, the learner's before the first update
    rollout: torch.Tensor  # [T, K] float32, the engine's


def centering_term(
    surrogate: PolicyLoss, inputs: LossInputs, heads: HeadLogprobs, weights: TokenWeights | None
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """What score centering adds to the loss of every token, to be minimised.

    Args:
        surrogate, inputs: as for `policy_loss`, which gives the sampled token's part of the loss.
        weights: the importance weights f; None: 1.

    Returns:
        [T] float32 of value 0, so that the value of the loss remains that of the surrogate, with
        the gradient of sum_v c[v] log p[v], which is 0 where the mask is False; and the metrics of
        the kept tokens: `score_centering/head_mass/mean`, the engine's probability of its head, and
        `score_centering/size/mean`, the sum of |c[v]|, which is 0 for equal policies.
    """
    coefficients = centering_coefficients(surrogate, inputs, heads, weights)
    is_counted = heads.is_present & inputs.mask[:, None]
    policy = torch.where(is_counted, heads.policy, 0.0)
    term = (coefficients.float() * (policy - policy.detach())).sum(1)
    mask = inputs.mask
    mass = _probabilities(heads.rollout, is_counted).sum(1)
    metrics: dict[str, Metric] = {
        f"score_centering/{name}/mean": Mean(
            sum=values[mask].sum(), count=mask.sum(dtype=torch.float64)
        )
        for name, values in (("head_mass", mass), ("size", coefficients.abs().sum(1)))
    }
    return term, metrics


@torch.no_grad()
def centering_coefficients(
    surrogate: PolicyLoss, inputs: LossInputs, heads: HeadLogprobs, weights: TokenWeights | None
) -> torch.Tensor:
    """The factor c[v] of every log p[v] of the head in the loss; it contains the advantage.

    Returns:
        [T, K] float64, 0 where the mask is False or the head has no token.
    """
    is_counted = heads.is_present & inputs.mask[:, None]
    each = (heads.policy, heads.old, heads.rollout)
    policy, old, rollout = (torch.where(is_counted, one.detach().double(), 0.0) for one in each)
    p, p_old, q = (_probabilities(one, is_counted) for one in (policy, old, rollout))
    rests = [(1.0 - one.sum(1)).clamp(min=0.0) for one in (p, p_old, q)]
    has_rest = inputs.mask & (torch.stack(rests).amin(0) > MIN_REST)
    rest, rest_old, rest_rollout = (torch.where(has_rest, one, 1.0) for one in rests)
    # The rest as one more token, the last column: rare, with the rest's ratios.
    last_rollout = torch.full_like(rest, RARE)
    last_old = last_rollout + (rest_old / rest_rollout).log()
    last_policy = last_old + (rest / rest_old).log()
    policy, old, rollout = (
        torch.cat([of_head, of_rest[:, None]], dim=1)
        for of_head, of_rest in ((policy, last_policy), (old, last_old), (rollout, last_rollout))
    )
    is_counted = torch.cat([is_counted, has_rest[:, None]], dim=1)
    factors = _slopes(surrogate, inputs, policy, old, is_counted)
    if weights is not None:
        of_tokens = weights(old.reshape(-1), rollout.reshape(-1))
        factors = factors * of_tokens.view_as(factors).double()
    factors = torch.where(is_counted, factors, 0.0)
    alpha = (rest_rollout / rest).clamp(max=MAX_REST_RATIO)
    return q * factors[:, :-1] - (alpha * factors[:, -1])[:, None] * p


def _probabilities(logprobs: torch.Tensor, is_counted: torch.Tensor) -> torch.Tensor:
    """[T, K] float64, 0 where not counted; no gradient."""
    return torch.where(is_counted, logprobs.detach().double().exp(), 0.0)


def _slopes(
    surrogate: PolicyLoss,
    inputs: LossInputs,
    policy: torch.Tensor,
    old: torch.Tensor,
    is_counted: torch.Tensor,
) -> torch.Tensor:
    """The slope s(v) of each of K + 1 tokens, [T, K + 1] float64, as if it had been sampled.

    Args:
        policy, old: [T, K + 1] log-probs. is_counted: [T, K + 1] bool.
    """
    shape, mask = is_counted.shape, is_counted.reshape(-1)
    with torch.enable_grad():
        leaf = policy.float().reshape(-1).requires_grad_()
        tokens = replace(
            inputs,
            policy_logprobs=torch.where(mask, leaf, 0.0),
            old_logprobs=torch.where(mask, old.float().reshape(-1), 0.0),
            advantages=inputs.advantages[:, None].expand(shape).reshape(-1),
            mask=mask,
            sequence_ids=inputs.sequence_ids[:, None].expand(shape).reshape(-1),
        )
        (slopes,) = torch.autograd.grad(surrogate(tokens).values.sum(), leaf)
    return slopes.double().view(shape)
