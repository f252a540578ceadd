"""The gap between engine and learner, token by token, as a run recorded it."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rl.rollout.recording import read_recomputed, read_step

BOUND = 2e-5  # of |d logprob| / max(1, |logprob|), float32 on both sides


def gaps_of_step(folder: Path, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] float64 relative gaps of all sampled tokens, and [N] their rollout log-probs."""
    groups = [each.group for each in read_step(folder, step)]
    recomputed = read_recomputed(folder, step)
    gaps, logprobs = [], []
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            kept = torch.tensor(rollout.loss_mask)
            assert set(rollout.weight_versions) <= {-1, step - 1}
            of_engine = torch.tensor(rollout.rollout_logprobs, dtype=torch.float64)[kept]
            of_learner = recomputed[group.prompt.index, index].double()[kept]
            gaps.append((of_engine - of_learner).abs() / of_engine.abs().clamp_min(1))
            logprobs.append(of_engine)
    return torch.cat(gaps), torch.cat(logprobs)
