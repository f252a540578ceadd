"""An environment makes rollouts of a prompt: it decides what is sampled, and what comes before,
between and after it.

`rollout/single_turn.py` samples one response. An environment with tools samples a turn, runs the
tool, appends its result and samples again; `rollout/episode.py` keeps token ids, mask, log-probs
and versions aligned. Token ids go in and come out, so that what is learnt from is exactly what was
sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_rl.config.rollout import SamplingConfig
from megatron_rl.engine.requests import Sampler
from megatron_rl.records import Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRequest:
    """How a prompt's rollouts are to be sampled.

    Example: `EpisodeRequest(num_samples=8, seed=1280, sampling=SamplingConfig(max_tokens=64))`.
    """

    num_samples: int
    # The prompt owns the records.MAX_SAMPLES seeds from this one on. Rollout j samples its first
    # turn with seed + j; a later turn needs another seed of these, e.g. turn t the one at
    # seed + j + t * num_samples, or its random numbers would repeat those of the first turn.
    seed: int
    sampling: SamplingConfig  # max_tokens bounds each request


class Environment(Protocol):
    """Makes the rollouts of a prompt from an engine's samples."""

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Sampler
    ) -> tuple[Rollout, ...]:
        """[num_samples] rollouts of one prompt.

        Every `GenerateRequest` should have `key=prompt.index`, so that all turns reach one engine.

        Raises:
            EngineError: passed on from the sampler.
        """
        ...
