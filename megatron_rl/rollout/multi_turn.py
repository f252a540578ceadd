"""The environment of several turns: the policy speaks, a tool answers, the policy speaks again.

    prompt | turn 1 | reply 1 | turn 2 | reply 2 | ... | turn n

The tokens of a turn are those that were sampled, and are never decoded and tokenized again; a reply
is tokenized by itself. So ids, mask, log-probs and versions are aligned by construction
(rollout/episode.py). The policy's tokens are trained on, the replies' are masked.

An episode ends when the tool has nothing to say, after `max_turns` turns, or when the response with
its replies has `sampling.max_tokens` tokens. If the tool hangs or fails, or the episode takes too
long, its rollout has the finish reason "timeout" or "crash": it is not scored, not trained on and
counted (`reward/failure_rate/mean`), and the other episodes of its prompt go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_rl.config.rollout import EnvironmentConfig
from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.records import Prompt, Rollout
from megatron_rl.rollout.environment import EpisodeRequest
from megatron_rl.rollout.episode import Episode

logger = logging.getLogger(__name__)


class ToolTimeout(Exception):
    """The tool did not answer within its time limit."""


class ToolCrash(Exception):
    """The tool raised an error, or its process ended."""


class ReplyIds(Protocol):
    """Tokenizes a reply, together with what a chat template puts around it."""

    def __call__(self, text: str, *, after_stop_token: bool) -> tuple[int, ...]:
        """
        Args:
            after_stop_token: whether the turn before it ends with its own stop token.
        """
        ...


@dataclass(slots=True, kw_only=True)
class _Course:
    """An episode on its way."""

    episode: Episode
    turns: list[str]
    finish_reason: str = "stop"


class MultiTurn:
    """An `Environment` whose episodes run concurrently.

    Args:
        reply: the tool's answer to the turns of the policy so far, the last one last; None: it has
            nothing to say. Raises ToolTimeout or ToolCrash.
        decode: returns the text of token ids, without special tokens.
        reply_ids: tokenizes a reply.
    """

    def __init__(
        self,
        reply: Callable[[Prompt, Sequence[str]], Awaitable[str | None]],
        decode: Callable[[Sequence[int]], str],
        reply_ids: ReplyIds,
        config: EnvironmentConfig,
    ) -> None:
        self._reply = reply
        self._decode = decode
        self._reply_ids = reply_ids
        self._config = config
        self.failures: Counter[str] = Counter()  # episodes by finish reason, since the start

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Sampler
    ) -> tuple[Rollout, ...]:
        """[num_samples] rollouts; the text of each is that of its last turn."""
        episodes = [
            self._rollout(prompt, request, sampler, sample) for sample in range(request.num_samples)
        ]
        return tuple(await asyncio.gather(*episodes))

    async def _rollout(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Sampler, sample: int
    ) -> Rollout:
        course = _Course(episode=Episode(), turns=[])
        course.episode.say(prompt.token_ids)
        try:
            async with asyncio.timeout(self._config.episode_seconds or None):
                await self._play(prompt, request, sampler, sample, course)
        except (ToolTimeout, ToolCrash, TimeoutError) as error:
            course.finish_reason = "crash" if isinstance(error, ToolCrash) else "timeout"
            self.failures[course.finish_reason] += 1
            logger.warning(
                "prompt %d, episode %d, turn %d: ended by a %s of its environment %s: %s",
                prompt.index,
                sample,
                len(course.turns),
                course.finish_reason,
                self._config.name,
                str(error) or f"{self._config.episode_seconds:g} s are over",
            )
        text = course.turns[-1] if course.turns else ""
        return course.episode.rollout(finish_reason=course.finish_reason, text=text)

    async def _play(
        self,
        prompt: Prompt,
        request: EpisodeRequest,
        sampler: Sampler,
        sample: int,
        course: _Course,
    ) -> None:
        """Take turns until the episode ends."""
        episode, end = course.episode, len(prompt.token_ids) + request.sampling.max_tokens
        for turn in range(self._config.max_turns):
            room = end - len(episode.token_ids)
            completion = await self._sample(prompt, request, sampler, sample, turn, course, room)
            course.finish_reason = completion.finish_reason
            if completion.finish_reason == "length" or turn == self._config.max_turns - 1:
                return
            answer = await self._reply(prompt, tuple(course.turns))
            if answer is None:
                return
            ids = self._reply_ids(answer, after_stop_token=completion.ends_with_stop_token)
            if len(episode.token_ids) + len(ids) >= end:
                course.finish_reason = "length"
                return
            episode.say(ids)

    async def _sample(
        self,
        prompt: Prompt,
        request: EpisodeRequest,
        sampler: Sampler,
        sample: int,
        turn: int,
        course: _Course,
        room: int,
    ) -> Completion:
        """The policy's next turn, of at most `room` tokens."""
        [completion] = await sampler.generate(
            GenerateRequest(
                token_ids=course.episode.token_ids,
                num_samples=1,
                seed=request.seed_of(sample, turn),
                sampling=replace(request.sampling, max_tokens=room),
                key=prompt.index,
                num_logprobs=request.num_logprobs,
            )
        )
        course.episode.sampled(completion)
        # A stop token need not be one that decoding leaves out as special.
        said = completion.token_ids[: -1 if completion.ends_with_stop_token else None]
        course.turns.append(self._decode(said))
        return completion
