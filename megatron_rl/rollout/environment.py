"""The interface of an environment, which produces the rollouts of a prompt: it decides which turns
are sampled, and which tokens come before, between and after them.

`rollout/single_turn.py` samples one response. An environment with tools samples a turn, runs the
tool, appends its result and samples again; `rollout/episode.py` keeps token ids, mask, log-probs
and versions aligned. Requests and completions consist of token ids, not text, so that the learner
trains on exactly the tokens that were sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_rl.config.rollout import SamplingConfig
from megatron_rl.engine.requests import Sampler
from megatron_rl.records import MAX_SAMPLES, Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRequest:
    """The number, seed and sampling settings of a prompt's rollouts.

    Example: `EpisodeRequest(num_samples=8, seed=1280, sampling=SamplingConfig(max_tokens=64))`.
    """

    num_samples: int
    # The prompt owns records.MAX_SAMPLES consecutive seeds, starting with this one; see `seed_of`.
    seed: int
    sampling: SamplingConfig  # max_tokens bounds each request
    num_logprobs: int = 0  # of every `GenerateRequest`: K of the rollouts' heads; 0: no heads

    def seed_of(self, sample: int, turn: int) -> int:
        """The seed of one turn of one rollout. No two are equal: the random numbers of a later turn
        do not repeat those of the first one.

        Raises:
            ValueError: more turns than the prompt has seeds for.
        """
        offset = sample + turn * self.num_samples
        if not 0 <= offset < MAX_SAMPLES:
            raise ValueError(
                f"turn {turn} of sample {sample}: expected samples x turns of at most "
                f"{MAX_SAMPLES}, the seeds of a prompt, got {self.num_samples} samples"
            )
        return self.seed + offset


class Environment(Protocol):
    """Builds the rollouts of a prompt from an engine's samples."""

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Sampler
    ) -> tuple[Rollout, ...]:
        """[num_samples] rollouts of one prompt.

        Every `GenerateRequest` should have `key=prompt.index`, so that all turns reach one engine.

        Raises:
            EngineError: raised by the sampler.
        """
        ...
