"""An environment that tells how many of the prompts are done."""

from __future__ import annotations

from collections.abc import Callable

from megatron_rl.engine.requests import Sampler
from megatron_rl.records import Prompt, Rollout
from megatron_rl.rollout.environment import Environment, EpisodeRequest


class CountedEpisodes:
    """An `Environment` around another one.

    Args:
        num_all: prompts that will be asked for.
        tell: called after each of them with what is done, and the share that is done, 0 to 1.
    """

    def __init__(
        self, environment: Environment, num_all: int, tell: Callable[[str, float], None]
    ) -> None:
        self._environment = environment
        self._tell = tell
        self.num_all = num_all
        self.num_done = 0

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Sampler
    ) -> tuple[Rollout, ...]:
        """See `Environment.rollouts`."""
        rollouts = await self._environment.rollouts(prompt, request, sampler)
        self.num_done += 1
        self._tell(f"{self.num_done:,} of {self.num_all:,} questions", self.num_done / self.num_all)
        return rollouts
