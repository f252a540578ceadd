"""The parity probe without engines and without a model: one number stands for the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.config import Config, SamplingConfig, SyncConfig
from megatron_rl.engine.routing import engine_of
from megatron_rl.errors import EnginesLostError, SyncError
from megatron_rl.loop.link import EngineLink
from megatron_rl.loop.parity import MAX_PROMPTS, MORE, PROMPTS, Findings, ParityProbe, given_tokens
from megatron_rl.records import Prompt, Rollout, Sample
from megatron_rl.rollout.environment import EpisodeRequest
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import make_group, make_prompt, make_rollout
from tests.fakes.learner import FakeLearner, FakeParallel

ONE, TWO = "http://one", "http://two"
STEP = 0.05  # of the weights in an update; log-probs change by up to 0.025
CONFIG = Config()


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
    """

    def __init__(self, *urls: str, rounding: float = 0.0, length: int = 100) -> None:
        self.urls, self.rounding, self.length = urls or (ONE,), rounding, length
        self.weights = 0.0
        self.served = dict.fromkeys(self.urls, 0.0)
        self.gaps: dict[int, float] = {}  # added to the log-probs of samples, by prompt
        self.asked: list[tuple[Prompt, EpisodeRequest]] = []
        self.pool = WorldPool(self)

    def update(self, *, stale: Sequence[str] = (), step: float = STEP) -> None:
        self.weights += step
        self.served |= {url: self.weights for url in self.urls if url not in stale}

    def engine_logprobs(self, url: str, token_ids: Sequence[int]) -> np.ndarray:
        weights = self.served[url]
        values = logprobs_of(token_ids, weights)
        noise = np.sin(1e4 * weights + 5.0 * np.asarray(token_ids) + 7.0 * np.arange(len(values)))
        return np.where(values == 0.0, 0.0, values + self.rounding * noise)

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Any
    ) -> tuple[Rollout, ...]:
        self.asked.append((prompt, request))
        url = engine_of(self.urls, prompt.index)
        rollout = make_rollout(min(self.length, request.sampling.max_tokens), engine=url)
        token_ids = (rollout.token_ids + 11 * prompt.index + request.seed % 97) % 98
        values = self.engine_logprobs(url, token_ids) + self.gaps.get(prompt.index, 0.0)
        served = np.where(rollout.loss_mask, values, 0.0)
        return (replace(rollout, token_ids=token_ids, rollout_logprobs=served),)

    def link(self) -> EngineLink:
        return EngineLink(
            publisher=None,  # type: ignore[arg-type]
            pool=self.pool,
            environment=self,
            prompts=lambda start, count: [make_prompt(start + index) for index in range(count)],
            log=Path("sync.jsonl"),
            check_after_failure=lambda: None,
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
            (each, torch.from_numpy(logprobs_of(each.rollout.token_ids, self.world.weights)))
            for each in reversed(samples)  # packing has an order of its own
        ]


def probe_of(world: World, *, dtype: str = "float32", **sync: Any) -> ParityProbe:
    config = replace(CONFIG, sync=SyncConfig(**sync), rollout=replace(CONFIG.rollout, dtype=dtype))
    return ParityProbe(WorldLearner(world), world.link(), config)


@pytest.mark.parametrize(
    ("dtype", "rounding", "tolerance"),
    [("float32", 0.0, 0.0), ("bfloat16", 0.005, 0.0), ("bfloat16", 0.05, 0.1)],
)
def test_sound_updates_pass_and_a_stale_engine_of_one_update_does_not(
    dtype: str, rounding: float, tolerance: float
) -> None:
    """Also where the rounding is twice the change, as in INT4."""
    for last_sound in range(1, 20):
        world = World(ONE, TWO, rounding=rounding)
        probe = probe_of(world, dtype=dtype, probe_tolerance=tolerance)
        probe.check(0, "0")
        for version in range(1, last_sound):
            world.update()
            figures = probe.check(version, str(version))
            assert figures["sync/probe_is_telling/min"] == 1.0
        world.update(stale=[TWO])
        with pytest.raises(SyncError, match=f"^engine {TWO} after update {last_sound}: parity"):
            probe.check(last_sound, "new")


def test_the_figures_of_an_update() -> None:
    world = World()
    probe = probe_of(world)
    assert set(probe.check(0, "0")) == {  # nothing has changed yet
        "sync/probe_gap/mean",
        "sync/probe_gap/max",
        "sync/probe_gap/standard_error",
        "sync/probe_relative_logprob_gap/max",
        "sync/probe_tokens/min",
    }
    world.update()
    figures = probe.check(1, "1")
    assert figures["sync/probe_tokens/min"] == 48
    assert figures["sync/probe_gap/mean"] < 1e-7
    assert figures["sync/probe_change_ratio/min"] == pytest.approx(1.0)
    # d/dw of 0.5 sin(w + ...) times STEP, over all phases.
    assert figures["sync/probe_learner_change/rms"] == pytest.approx(
        0.5 * STEP / math.sqrt(2), rel=0.3
    )
    assert figures["sync/probe_engine_change/rms"] == pytest.approx(
        figures["sync/probe_learner_change/rms"]
    )


def test_an_update_that_changes_nothing_says_nothing() -> None:
    """A learning rate of 0, or one that the engines' precision does not show: the same bytes."""
    world = World()
    probe = probe_of(world, dtype="bfloat16")
    probe.check(0, "0")
    assert probe.check(1, "0")["sync/probe_is_telling/min"] == 0.0
    world.update(stale=[ONE], step=1e-3)
    assert probe.check(2, "0")["sync/probe_is_telling/min"] == 0.0
    world.update(stale=[ONE], step=1e-3)
    with pytest.raises(SyncError, match="serves the weights of an earlier update"):
        probe.check(3, "3")


def test_every_engine_samples_its_tokens_from_the_whole_distribution() -> None:
    world = World(ONE, TWO)
    sampling = SamplingConfig(top_p=0.9, top_k=20, min_p=0.1, stop=["x"], stop_token_ids=[5])
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, sampling=sampling))
    ParityProbe(WorldLearner(world), world.link(), config).check(0, "0")
    assert [prompt.index for prompt, _ in world.asked] == list(range(2 * PROMPTS))
    for _, request in world.asked:
        found = request.sampling
        assert (found.top_k, found.top_p, found.min_p) == (0, 1.0, 0.0)
        assert (found.stop, found.stop_token_ids) == ([], [])
        assert (request.num_samples, found.max_tokens) == (1, 6)  # 48 tokens of 8 samples


@pytest.mark.parametrize(("length", "num_prompts"), [(1, 48), (2, 24), (5, 10)])
def test_it_samples_until_it_has_its_tokens(length: int, num_prompts: int) -> None:
    """And asks for as many at once the next time, so that it costs one round."""
    world = World(ONE, TWO, length=length)
    probe = probe_of(world)
    assert probe.check(0, "0")["sync/probe_tokens/min"] >= 48
    assert [prompt.index for prompt, _ in world.asked] == list(range(2 * num_prompts))
    world.asked.clear()
    world.update()
    assert probe.check(1, "1")["sync/probe_tokens/min"] == num_prompts * length
    assert len(world.asked) == 2 * num_prompts
    world.length = 100
    probe.check(2, "2")
    world.asked.clear()
    probe.check(3, "3")
    assert len(world.asked) == 2 * PROMPTS


def test_it_gives_up_sampling_after_some_rounds() -> None:
    world = World(length=1)
    assert probe_of(world, probe_num_tokens=10_000).check(0, "0")
    assert len(world.asked) == PROMPTS + 3 * MAX_PROMPTS


def test_above_the_bound_by_chance_it_asks_again_and_passes() -> None:
    """One of eight samples is 0.25 off, the others are not: a mean of 0.02 > 0.015."""
    world = World(rounding=1e-4)
    world.gaps = {3: 0.5}
    figures = probe_of(world, dtype="bfloat16").check(0, "0")
    assert figures["sync/probe_tokens/min"] == 48 * (1 + MORE)
    assert 1e-4 < figures["sync/probe_gap/mean"] < 0.015
    assert len(world.asked) == PROMPTS * (1 + MORE)
    assert len({prompt.index for prompt, _ in world.asked}) == len(world.asked)


def test_above_the_bound_by_a_mistake_it_tells_so_in_standard_errors() -> None:
    world = World()
    world.gaps = dict.fromkeys(range(200), 0.2)
    with pytest.raises(SyncError, match=r"mean \|p - p\| of at most 0.015 .* standard errors abo"):
        probe_of(world, dtype="bfloat16").check(7, "7")


def test_in_float32_the_new_tokens_must_violate_the_condition_too() -> None:
    world = World()
    world.gaps = {3: 1e-4}
    assert probe_of(world).check(0, "0")["sync/probe_relative_logprob_gap/max"] > 2e-5
    world.gaps = {3: 1e-4, 20: 1e-4}
    with pytest.raises(SyncError, match=r"max \|d logprob\|"):
        probe_of(world).check(0, "0")


def test_a_log_prob_that_is_none_ends_the_run() -> None:
    world = World()
    world.gaps = {3: math.nan}
    with pytest.raises(SyncError, match="expected finite log-probs"):
        probe_of(world).check(0, "0")


def test_given_tokens_are_scored_at_temperature_1() -> None:
    world = World()
    probe = probe_of(world)
    probe.check(0, "0")
    assert probe._learner.temperatures == [1.0, None]


def test_given_tokens_leave_room_for_one_more() -> None:
    samples = [
        Sample(prompt_index=9, sample_index=0, rollout=each, reward=0.0, advantage=0.0)
        for each in make_group(9, make_rollout(4), make_rollout(0)).rollouts
    ]
    long, short = given_tokens(samples)
    assert long.rollout.token_ids.tolist() == [1, 5, 6, 6, 6]
    assert long.rollout.loss_mask.tolist() == [False, True, True, True, True]
    assert short.rollout.token_ids.tolist() == [1, 5]
    assert [each.prompt_index for each in (long, short)] == [0, 1]


def test_another_rank_does_what_the_first_one_found() -> None:
    """It asks no engine, takes part in every pass, and raises the same error."""
    doubtful = Findings(figures={}, complaint="", is_doubtful=True)
    wrong = Findings(figures={}, complaint="engine http://one is wrong", is_doubtful=True)
    answers = iter([(True, (ONE,)), False, doubtful, False, wrong])
    parallel = FakeParallel(rank=1, is_last_stage=False)
    parallel.from_first_rank = lambda value: next(answers)  # type: ignore[method-assign]
    learner = FakeLearner(parallel=parallel)
    with pytest.raises(SyncError, match=r"^engine http://one is wrong$"):
        ParityProbe(learner, None, CONFIG).check(3, "")
    assert learner.log == ["score_samples 0"] * 4
    assert list(answers) == []


def test_an_engine_that_is_lost_meanwhile_gives_no_figures() -> None:
    """The weights are then published again to the others, whose given tokens begin anew."""
    world = World(ONE, TWO)
    probe = probe_of(world)
    probe.check(0, "0")

    async def lose(*asked: Any) -> tuple[Rollout, ...]:
        world.pool.urls = (ONE,)
        return await World.rollouts(world, *asked)

    world.update()
    world.rollouts = lose  # type: ignore[method-assign]
    assert probe.check(1, "1") is None
    world.urls, world.rollouts = (ONE,), partial(World.rollouts, world)  # type: ignore
    figures = probe.check(1, "1")
    assert figures is not None and "sync/probe_change_ratio/min" not in figures
    world.update()
    assert "sync/probe_change_ratio/min" in probe.check(2, "2")
    world.pool.shortage_error = EnginesLostError("none is left")
    assert probe.check(2, "2") is None
