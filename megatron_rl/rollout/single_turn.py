"""The single-turn environment: a rollout is the prompt and one sampled response."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.records import Prompt, Rollout
from megatron_rl.rollout.environment import EpisodeRequest
from megatron_rl.rollout.episode import Episode


class SingleTurn:
    """An `Environment` that asks for all samples of a prompt in one request.

    Args:
        decode: returns the text of a response's token ids, without special tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Sampler
    ) -> tuple[Rollout, ...]:
        """[num_samples] rollouts; rollout j is drawn with `request.seed + j`."""
        completions = await sampler.generate(
            GenerateRequest(
                token_ids=prompt.token_ids,
                num_samples=request.num_samples,
                seed=request.seed,
                sampling=request.sampling,
                key=prompt.index,
                num_logprobs=request.num_logprobs,
            )
        )
        return tuple(self._rollout(prompt, completion) for completion in completions)

    def _rollout(self, prompt: Prompt, completion: Completion) -> Rollout:
        episode = Episode()
        episode.say(prompt.token_ids)
        episode.sampled(completion)
        # A stop token need not be one that decoding leaves out as special.
        end = -1 if completion.ends_with_stop_token else None
        return episode.rollout(
            finish_reason=completion.finish_reason, text=self._decode(completion.token_ids[:end])
        )
