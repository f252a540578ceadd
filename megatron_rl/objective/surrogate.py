"""Log-ratios and shaped advantages come in, the surrogate of every kept token goes out, to be
maximised. With r = p_theta / p_old and clip(r) = clip(r, 1 - clip_low, 1 + clip_high):

    ppo_clip   min(r A, clip(r) A), of PPO (arXiv 1707.06347), GRPO (arXiv 2402.03300), and DAPO
               (arXiv 2503.14476) with its own upper bound
    gspo       ppo_clip of s, the geometric mean of the sequence's r, whose gradient stays with the
               token: s_t = sg[s] p_theta / sg[p_theta]               (arXiv 2507.18071, GSPO-token)
    cispo      sg[clip(r)] A log p_theta: every token keeps a gradient (arXiv 2506.13585)
    dppo_tv    r A, but 0 where p_theta - p_old has left [-clip_low, clip_high] in the direction of
               the advantage: a trust region in probability, not in ratio (arXiv 2602.04879)

Every tensor is [T] and holds 0 where the mask is False (`objective.loss.policy_loss` sees to it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.config.choices import POLICY_LOSSES
from megatron_rl.errors import ConfigError
from megatron_rl.objective.sequences import mean_by_sequence, to_tokens

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to +-20 before exp, so that ratios stay below 4.9e8


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """Example of one token, r = 2, A = 3, bounds 0.8 to 1.2: `Surrogate(values=[3.6],
    ratio=[2.0], is_clipped_low=[False], is_clipped_high=[True])`.
    """

    values: torch.Tensor  # [T] float32, under gradient
    ratio: torch.Tensor  # [T] float64, no gradient: what was clipped, a sequence's for gspo
    is_clipped_low: torch.Tensor  # [T] bool, the lower bound acted on the token
    is_clipped_high: torch.Tensor  # [T] bool


def ppo_clip(
    policy: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """The clipped surrogate; both bounds act only where they lower it."""
    log_ratio = (policy - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return _clipped(log_ratio.exp(), log_ratio.detach(), advantages, clip_low, clip_high)


def gspo(
    policy: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """The clipped surrogate of the sequence's ratio over its kept tokens."""
    of_sequences = mean_by_sequence(policy.detach() - old, mask, sequence_ids)
    log_ratio = to_tokens(of_sequences, sequence_ids).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp().float() * (policy - policy.detach()).exp()
    return _clipped(ratio, log_ratio, advantages, clip_low, clip_high)


def cispo(
    policy: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """The policy gradient with a clipped weight; a bound acts whatever the advantage's sign."""
    log_ratio = (policy.detach() - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).double()
    ratio = log_ratio.exp()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high).float()
    return Surrogate(
        values=weight * advantages * policy,
        ratio=ratio,
        is_clipped_low=ratio < 1.0 - clip_low,
        is_clipped_high=ratio > 1.0 + clip_high,
    )


def dppo_tv(
    policy: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """The unclipped surrogate inside a region of total variation; the bounds are probabilities."""
    log_ratio = (policy - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    moved = policy.detach().double().exp() - old.double().exp()
    is_high = (moved > clip_high) & (advantages > 0)
    is_low = (moved < -clip_low) & (advantages < 0)
    values = torch.where(is_high | is_low, 0.0, log_ratio.exp() * advantages)
    return Surrogate(
        values=values,
        ratio=log_ratio.detach().double().exp(),
        is_clipped_low=is_low,
        is_clipped_high=is_high,
    )


def _clipped(
    ratio: torch.Tensor,
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    exact = log_ratio.double().exp()
    return Surrogate(
        values=torch.minimum(ratio * advantages, clipped * advantages),
        ratio=exact,
        is_clipped_low=(exact < 1.0 - clip_low) & (advantages < 0),
        is_clipped_high=(exact > 1.0 + clip_high) & (advantages > 0),
    )


KINDS = POLICY_LOSSES


def surrogate(
    kind: str,
    policy: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    sequence_ids: torch.Tensor | None,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """The surrogate of that name.

    Raises:
        ConfigError: an unknown `kind`. ValueError: gspo without sequence ids.
    """
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    match kind:
        case "ppo_clip":
            return ppo_clip(policy, old, advantages, **bounds)
        case "gspo":
            if sequence_ids is None:
                raise ValueError("gspo: expected sequence_ids [T], got None")
            return gspo(policy, old, advantages, mask, sequence_ids, **bounds)
        case "cispo":
            return cispo(policy, old, advantages, **bounds)
        case "dppo_tv":
            return dppo_tv(policy, old, advantages, **bounds)
    raise ConfigError(f"objective.policy_loss: expected one of {', '.join(KINDS)}, got {kind!r}")
