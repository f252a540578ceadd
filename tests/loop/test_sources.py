"""Which source a run samples from, and that a run that does not sample ahead asks for exactly what
a step needs: the same prompts, in the same order, with the same seeds, and nothing beside it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest

from megatron_rl.config import Config
from megatron_rl.loop.ahead import is_ahead
from megatron_rl.loop.sources import sampling_source
from megatron_rl.loop.state import LoopState
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.records import Prompt, RolloutGroup, Score
from megatron_rl.rollout.buffer import BufferedSource
from megatron_rl.rollout.live import LiveSource
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.rollout.single_turn import SingleTurn
from megatron_rl.rollout.source import RolloutRequest, RolloutSource
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import make_prompt, make_scores
from tests.fakes.learner import FakeParallel

CONFIG = Config()


def prompts(start: int, count: int) -> list[Prompt]:
    return [make_prompt(index) for index in range(start, start + count)]


def score(groups: Sequence[RolloutGroup]) -> list[tuple[Score, ...]]:
    return [make_scores(*[1.0] * len(group.rollouts)) for group in groups]


def source_of(max_age: int, pool: FakePool, stack: ExitStack) -> RolloutSource:
    rollout = replace(CONFIG.rollout, max_policy_age=max_age)
    loop = replace(CONFIG.loop, num_steps=3, prompts_per_step=4, samples_per_prompt=2, seed=11)
    return sampling_source(
        prompts,
        SingleTurn(str),
        pool,
        score,
        state=LoopState(dual=DualVariable(0.1)),
        config=replace(CONFIG, rollout=rollout, loop=loop),
        parallel=FakeParallel(),
        time=lambda _: contextlib.nullcontext(),
        is_changed=False,
        stack=stack,
        routed=None,
    )


def test_age_zero_is_the_synchronous_loop() -> None:
    assert CONFIG.rollout.max_policy_age == 0 and not is_ahead(CONFIG)  # the default
    pool, threads = FakePool(), threading.active_count()
    with ExitStack() as stack:
        source = source_of(0, pool, stack)
        assert isinstance(source, LiveSource)
        for step in (1, 2, 3):
            pool.weight_version = step - 1
            request = RolloutRequest(
                step=step, first_prompt=4 * (step - 1), num_prompts=4, weight_version=step - 1
            )
            pool.requests.clear()
            taken = source.take(request)
            indices = [*range(4 * (step - 1), 4 * step)]
            assert [each.group.prompt.index for each in taken.groups] == indices
            asked = [(each.key, each.seed) for each in pool.requests]
            assert asked == [(index, sampling_seed(11, step, index)) for index in indices]
            assert taken.metrics == {}  # its metrics are those of the step alone
    assert threading.active_count() == threads


@pytest.mark.parametrize("max_age", [1, 2])
def test_above_it_the_source_samples_ahead(max_age: int) -> None:
    with ExitStack() as stack:
        assert isinstance(source_of(max_age, FakePool(), stack), BufferedSource)
