"""Computes `log rho = log p_one - log p_other` from two policies' log-probs of the same tokens."""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to +-20 before exp, so that ratios stay below 4.9e8


def log_ratios(
    recomputed_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """`log rho`, the log of the learner's probability over the engine's; also for other policies.

    Args:
        recomputed_logprobs, rollout_logprobs: [T] float32; no gradient flows through either.
        mask: [T] bool.

    Returns:
        [T] float64, unclamped, 0 where the mask is False.
    """
    if not recomputed_logprobs.shape == rollout_logprobs.shape == mask.shape:
        raise ValueError(
            f"log_ratios: expected log-probs of the mask's shape {tuple(mask.shape)}, got "
            f"{tuple(recomputed_logprobs.shape)} and {tuple(rollout_logprobs.shape)}"
        )
    difference = recomputed_logprobs.detach().double() - rollout_logprobs.detach().double()
    return torch.where(mask, difference, 0.0)
