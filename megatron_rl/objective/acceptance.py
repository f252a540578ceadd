"""Decides whether an update stays: estimates, on samples of the engine before the update, how good
the learner's new policy is, and how good the engine's is, which has the same new weights.

    J(p) = mean over tokens of min(p[t] / p_inf[t], cap) * A[t]       p_inf: the engine that sampled
    the update stays if  J(learner) - J(engine) <= max_loss

Source: the second step of MIPU (arXiv 2606.29526), which accepts an update if T_post, its estimate
of J(engine) - J(learner), is at least -c. The paper estimates it with new rollouts; here the step's
own samples are weighted instead, so that nothing has to be sampled. Its first step is the truncated
weight p_train / p_inf in the loss (`objective.importance`).
"""

from __future__ import annotations

import torch

from megatron_rl.objective.log_ratio import MAX_LOG_RATIO, log_ratios


def weighted_objective(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    cap: float,
) -> float:
    """J of the policy that gave `logprobs`.

    Args:
        logprobs, rollout_logprobs: [N] float32, of the sampled tokens of all samples.
        advantages: [N] float32, the group's, before any shaping.
        cap: upper bound of a token's weight, at least 1.

    Raises:
        ValueError: there is no token, or the shapes differ.
    """
    if logprobs.shape != advantages.shape or not logprobs.numel():
        raise ValueError(
            f"weighted_objective: expected log-probs and advantages of one shape [N] with N of at "
            f"least 1, got {tuple(logprobs.shape)} and {tuple(advantages.shape)}"
        )
    everything = torch.ones_like(logprobs, dtype=torch.bool)
    log_ratio = log_ratios(logprobs, rollout_logprobs, everything)
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)
    return float((weights * advantages.double()).mean())
