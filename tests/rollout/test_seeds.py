"""Seeds leave room for the samples of a prompt, also in the 32 bits that a CPU generator uses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_rl.config import SamplingConfig
from megatron_rl.records import MAX_SAMPLES
from megatron_rl.rollout.environment import EpisodeRequest
from megatron_rl.rollout.seeds import sampling_seed


def test_seeds_leave_room_for_samples() -> None:
    for step in range(3):
        seeds = [sampling_seed(11, step, index) for index in range(2000)]
        assert all(0 <= seed < 2**63 for seed in seeds)
        # A CPU generator reads the low 32 bits only.
        generator = torch.Generator()
        low = [seed % 2**32 for seed in seeds]
        first = [torch.rand(1, generator=generator.manual_seed(s)) for s in (seeds[0], low[0])]
        assert first[0] == first[1]
        taken = {(seed + sample) % 2**32 for seed in seeds for sample in (0, MAX_SAMPLES - 1)}
        assert len(taken) == 2 * len(seeds)
        rows = sorted(low)
        assert all(b - a >= MAX_SAMPLES for a, b in pairwise(rows))
    assert sampling_seed(11, 0, 5) == sampling_seed(11, 0, 5)
    assert len({sampling_seed(run, step, 5) for run in range(9) for step in range(9)}) == 81


def test_seeds_stay_what_they_were() -> None:
    """Recorded runs can be sampled again."""
    assert sampling_seed(0, 1, 0) == 8_944_392_749_622_110_464
    assert sampling_seed(7, -1, 123) == 8_579_740_627_110_681_344


def test_the_seeds_of_turns_differ_and_stay_the_prompts_own() -> None:
    request = EpisodeRequest(num_samples=8, seed=256, sampling=SamplingConfig())
    seeds = [request.seed_of(sample, turn) for turn in range(32) for sample in range(8)]
    assert seeds == list(range(256, 512))  # all that the prompt owns, each once
    with pytest.raises(ValueError, match="samples x turns of at most 256"):
        request.seed_of(0, 32)
