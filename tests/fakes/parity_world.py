"""The world of the parity probe, in which one number stands for the weights of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rl.engine.routing import engine_of
from megatron_rl.errors import EnginesLostError
from megatron_rl.loop.link import EngineLink
from megatron_rl.records import Prompt, Rollout, Sample
from megatron_rl.rollout.environment import EpisodeRequest
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import make_prompt
from tests.fakes.learner import FakeLearner

ONE, TWO = "http://one", "http://two"
STEP = 0.05  # of the weights in an update; log-probs change by up to 0.025


def logprobs_of(token_ids: Sequence[int], weights: float) -> np.ndarray:
    """[L], 0.0 for the first token; they depend on the token and on its place."""
    places = np.arange(len(token_ids))
    values = -1.0 + 0.5 * np.sin(weights + 2.0 * np.asarray(token_ids) + 3.0 * places)
    return np.where(places == 0, 0.0, values)


class World:
    """A learner and engines, which are the sources of all log-probs.

    Args:
        rounding: of the engines: how far their log-probs are off, in another way at all weights.
        length: of a response.
        num_prompts: different ones, over and over; None: no two are the same.
        prompt_length: tokens of a prompt.
        is_sure: every token has probability 1, whatever the weights are.
    """

    def __init__(
        self,
        *urls: str,
        rounding: float = 0.0,
        length: int = 100,
        num_prompts: int | None = None,
        prompt_length: int = 2,
        is_sure: bool = False,
    ) -> None:
        self.urls, self.rounding, self.length = urls or (ONE,), rounding, length
        self.num_prompts, self.prompt_length, self.is_sure = num_prompts, prompt_length, is_sure
        self.version, self.weights = 0, 0.0
        self.served = dict.fromkeys(self.urls, 0.0)
        self.of_even_tokens = dict(self.served)
        self.lengths: dict[int, int] = {}  # of responses whose length is another, by prompt
        self.gaps: dict[int, float] = {}  # added to the log-probs of samples, by prompt
        self.asked: list[tuple[Prompt, EpisodeRequest]] = []
        self.pool = WorldPool(self)

    def update(
        self, *, stale: Sequence[str] = (), partial: Sequence[str] = (), step: float = STEP
    ) -> None:
        """An update that does not reach the stale engines, and of which the partial ones take
        nothing for the tokens of even ids.
        """
        self.version, self.weights = self.version + 1, self.weights + step
        self.served |= {url: self.weights for url in self.urls if url not in stale}
        whole = [url for url in self.urls if url not in partial]
        self.of_even_tokens |= {url: self.served[url] for url in whole}

    def learner_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        values = logprobs_of(token_ids, self.weights)
        return np.zeros_like(values) if self.is_sure else values

    def engine_logprobs(self, url: str, token_ids: Sequence[int]) -> np.ndarray:
        if self.is_sure:
            return np.zeros(len(token_ids))
        weights = self.served[url]
        of_even = logprobs_of(token_ids, self.of_even_tokens[url])
        is_even = np.asarray(token_ids) % 2 == 0
        values = np.where(is_even, of_even, logprobs_of(token_ids, weights))
        noise = np.sin(1e4 * weights + 5.0 * np.asarray(token_ids) + 7.0 * np.arange(len(values)))
        return np.where(values == 0.0, 0.0, values + self.rounding * noise)

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Any
    ) -> tuple[Rollout, ...]:
        self.asked.append((prompt, request))
        url = engine_of(self.urls, prompt.index)
        number = prompt.index % self.num_prompts if self.num_prompts else prompt.index
        prompt_ids = (5 * np.arange(self.prompt_length) ** 2 + 11 * number) % 98
        length = self.lengths.get(prompt.index, self.length)
        count = min(length, request.sampling.max_tokens)
        drawn = (6 + 11 * number + request.seed % 97 + np.zeros(count, dtype=int)) % 98
        token_ids = np.concatenate([prompt_ids, drawn])
        mask = np.arange(len(token_ids)) >= self.prompt_length
        values = self.engine_logprobs(url, token_ids) + self.gaps.get(prompt.index, 0.0)
        rollout = Rollout(
            token_ids=token_ids,
            loss_mask=mask,
            rollout_logprobs=np.where(mask, values, 0.0),
            weight_versions=np.where(mask, 0, -1),
            finish_reason="stop",
            text="2",
            engine=url,
        )
        return (rollout,)

    def link(self) -> EngineLink:
        return EngineLink(
            publisher=None,  # type: ignore[arg-type]
            pool=self.pool,
            environment=self,
            prompts=lambda start, count: [make_prompt(start + index) for index in range(count)],
            log=Path("sync.jsonl"),
        )


class WorldPool(FakePool):
    def __init__(self, world: World) -> None:
        super().__init__(world.urls)
        self._world = world
        self.shortage_error: EnginesLostError | None = None

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        if self.shortage_error is not None:
            raise self.shortage_error
        self.scored += [tuple(each) for each in sequences]
        return [
            tuple(self._world.engine_logprobs(engine_of(self.urls, number), each).tolist())
            for number, each in enumerate(sequences)
        ]


class WorldLearner(FakeLearner):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.temperatures = world, []

    def score_samples(
        self,
        samples: Sequence[Sample],
        *,
        tokens_per_row: int,
        temperature: float | None = None,
    ) -> list[tuple[Sample, torch.Tensor]]:
        self.temperatures.append(temperature)
        return [
            (each, torch.from_numpy(self.world.learner_logprobs(each.rollout.token_ids)))
            for each in reversed(samples)  # packing has an order of its own
        ]
