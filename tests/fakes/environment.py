"""A tool environment of two turns: the policy speaks, a tool answers with the sum of its token ids,
and the policy speaks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from megatron_rl.engine.requests import GenerateRequest, Sampler
from megatron_rl.records import Prompt, Rollout
from megatron_rl.rollout.environment import EpisodeRequest
from megatron_rl.rollout.episode import Episode

NUM_TURNS = 2
TOOL_BEGIN, TOOL_END = 120, 121  # around the tool's result


class TwoTurns:
    """An `Environment`; the text of a rollout is that of its last turn."""

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Sampler
    ) -> tuple[Rollout, ...]:
        """[num_samples] episodes, run concurrently."""
        episodes = [
            self._episode(prompt, request, sampler, sample) for sample in range(request.num_samples)
        ]
        return tuple(await asyncio.gather(*episodes))

    async def _episode(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Sampler, sample: int
    ) -> Rollout:
        episode = Episode()
        episode.say(prompt.token_ids)
        for turn in range(NUM_TURNS):
            [completion] = await sampler.generate(
                GenerateRequest(
                    token_ids=episode.token_ids,
                    num_samples=1,
                    seed=request.seed_of(sample, turn),
                    sampling=request.sampling,
                    key=prompt.index,
                    num_logprobs=request.num_logprobs,
                )
            )
            episode.sampled(completion)
            if turn < NUM_TURNS - 1:
                episode.say(tool_result(completion.token_ids))
        return episode.rollout(
            finish_reason=completion.finish_reason, text=str(completion.token_ids)
        )


def tool_result(token_ids: Sequence[int]) -> tuple[int, ...]:
    """What the tool returns for the tokens of a turn."""
    return (TOOL_BEGIN, 3 + sum(token_ids) % 95, TOOL_END)
