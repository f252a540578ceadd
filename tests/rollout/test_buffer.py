"""Sampling ahead on a thread, with engines that answer when the test lets them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from megatron_rl.config import SamplingConfig
from megatron_rl.config.choices import HandOut, LateGroups
from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.errors import EngineError, EnginesLostError
from megatron_rl.observe.metrics import Max, Sum
from megatron_rl.records import Prompt, RolloutGroup, Score, ScoredGroup
from megatron_rl.rollout import buffer
from megatron_rl.rollout.buffer import BufferedSource
from megatron_rl.rollout.environment import EpisodeRequest
from megatron_rl.rollout.ledger import Ledger
from megatron_rl.rollout.live import sample_group
from megatron_rl.rollout.shelf import Shelf
from megatron_rl.rollout.single_turn import SingleTurn
from megatron_rl.rollout.source import RolloutRequest, TakenRollouts
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import make_prompt, make_scores, scored

DEADLINE = 5.0
PER_STEP = 2


class HeldPool(FakePool):
    """Answers for a prompt once it is released, with the weights of when it was asked."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.cancelled: list[int] = []
        self._released: set[int] = set()

    def release(self, *keys: int) -> None:
        self._released |= {*keys}

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        version = self.weight_version
        try:
            while request.key not in self._released:
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled.append(request.key)
            raise
        return tuple(
            replace(each, weight_versions=(version,) * len(each.token_ids))
            for each in await super().generate(request)
        )


class Bench:
    """A source, and the state that the loop would keep."""

    def __init__(
        self,
        pool: FakePool,
        *,
        max_age: int = 1,
        hand_out: HandOut = "in_order",
        late_groups: LateGroups = "wait",
        kept: Sequence[ScoredGroup] = (),
    ) -> None:
        self.version = 0
        self.started: list[tuple[int, int]] = []  # prompt and version
        self.pool = pool
        self.source = BufferedSource(
            lambda start, count: [make_prompt(start + number) for number in range(count)],
            self._sample,
            pool,
            self._score,
            shelf=Shelf(
                max_age=max_age,
                prompts_per_step=PER_STEP,
                num_steps=100,
                hand_out=hand_out,
                late_groups=late_groups,
            ),
            max_age=max_age,
            indices=Ledger().unused(0, 1),
            kept={each.group.prompt.index: each for each in kept},
            share=lambda count: (0, count),
            version=lambda: self.version,
            time=lambda _: contextlib.nullcontext(),
        )

    async def _sample(self, prompt: Prompt, version: int, sampler: Sampler) -> RolloutGroup:
        self.started.append((prompt.index, version))
        request = EpisodeRequest(num_samples=2, seed=0, sampling=SamplingConfig(max_tokens=4))
        return await sample_group(SingleTurn(str), prompt, request, sampler)

    def _score(self, groups: Sequence[RolloutGroup]) -> list[tuple[Score, ...]]:
        assert threading.current_thread() is not threading.main_thread()
        return [make_scores(*[1.0] * len(group.rollouts)) for group in groups]

    def publish(self, version: int) -> None:
        self.version = self.pool.weight_version = version

    def take(self, step: int, count: int = PER_STEP) -> TakenRollouts:
        return self.source.take(
            RolloutRequest(
                step=step, first_prompt=0, num_prompts=count, weight_version=self.version
            )
        )

    def taken(self, step: int) -> list[int]:
        return [each.group.prompt.index for each in self.take(step).groups]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_prompts_are_sampled_while_the_learner_trains() -> None:
    pool = HeldPool()
    bench = Bench(pool)
    with bench.source:
        pool.release(0, 1)
        assert bench.taken(1) == [0, 1]
        assert [index for index, _ in bench.started] == [0, 1, 2, 3]
        assert bench.source.finished() == []
        pool.release(2, 3)  # while step 1 trains
        wait_until(lambda: len(bench.source.finished()) == PER_STEP)
        time.sleep(0.15)
        assert len(bench.started) == 4  # the bound: nothing more before the next publication
        bench.publish(1)
        wait_until(lambda: len(bench.started) == 6)
        taken = bench.take(2)
        assert [each.group.prompt.index for each in taken.groups] == [2, 3]
        assert taken.metrics["rollout/age/max"] == Max(1)
        assert taken.metrics["rollout/num_late"] == Sum(0.0)
        assert bench.started[4:] == [(4, 1), (5, 1)]
        assert bench.source.take_used() == [0, 1, 2, 3]


def test_nothing_is_sampled_before_the_first_step_asks() -> None:
    bench = Bench(FakePool())
    with bench.source:
        time.sleep(0.1)
        assert bench.started == []


def test_a_group_that_may_not_grow_older_is_waited_for() -> None:
    pool = HeldPool()
    bench = Bench(pool, hand_out="finished")
    with bench.source:
        pool.release(1, 2)
        assert bench.taken(1) == [1, 2]
        bench.publish(1)
        pool.release(4, 5)
        wait_until(lambda: len(bench.source.finished()) == 2)
        threading.Timer(0.1, pool.release, (0, 3)).start()
        assert bench.taken(2) == [0, 3]
        bench.publish(2)
        assert bench.taken(3) == [4, 5]


def test_late_groups_are_dropped_counted_and_ended(caplog: pytest.LogCaptureFixture) -> None:
    pool = HeldPool()
    bench = Bench(pool, hand_out="finished", late_groups="drop")
    with bench.source, caplog.at_level(logging.WARNING):
        pool.release(1, 2, 4, 5, 6, 7)
        assert bench.taken(1) == [1, 2]
        bench.publish(1)
        assert bench.taken(2) == [4, 5]
        bench.publish(2)
        taken = bench.take(3)
        assert [each.group.prompt.index for each in taken.groups] == [6, 7]
        assert taken.metrics["rollout/num_late"] == Sum(2.0)
        wait_until(lambda: sorted(pool.cancelled) == [0, 3])
        assert bench.source.take_used() == [1, 2, 4, 5, 0, 3, 6, 7]
    assert "dropped the groups of prompts [0, 3]" in caplog.text


def test_groups_that_a_checkpoint_kept_are_not_sampled_again() -> None:
    bench = Bench(FakePool(), kept=[scored(1, 1.0, 0.0)])
    with bench.source:
        groups = bench.take(1).groups
        assert groups[1] == scored(1, 1.0, 0.0)
        assert [index for index, _ in bench.started] == [0, 2, 3]


def test_an_error_of_the_thread_ends_the_step() -> None:
    bench = Bench(FakePool(failures={1: EngineError("engine http://a: exited with code 7")}))
    with bench.source, pytest.raises(EngineError, match="exited with code 7"):
        bench.take(1)


class Dead(FakePool):
    async def watch(self) -> None:
        raise EngineError("engine http://a: was killed")


def test_an_engine_that_dies_ends_the_step() -> None:
    pool = type("DeadAndHeld", (Dead, HeldPool), {})()
    bench = Bench(pool)
    with bench.source, pytest.raises(EngineError, match="was killed"):
        bench.take(1)


class Losing(FakePool):
    """Too few engines serve while `lost` says so; requests fail then."""

    lost = ""

    def shortage(self) -> str:
        return self.lost

    def last_answers(self) -> str:
        return "http://a answered prompt 3 7 s ago"

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        if self.lost:
            raise EnginesLostError(self.lost)
        return await super().generate(request)


def test_a_step_without_engines_is_told_so_and_goes_on_when_they_are_back() -> None:
    pool = Losing()
    pool.lost = "http://a froze"
    bench = Bench(pool)
    with bench.source:
        with pytest.raises(EnginesLostError, match="http://a froze"):
            bench.take(1)
        wait_until(lambda: len(bench.started) == 4)
        pool.lost = ""
        assert bench.taken(1) == [0, 1]
        # The same versions, and so the same seeds.
        assert {version for _, version in bench.started} == {0}


def test_a_step_that_waits_says_for_what(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(buffer, "TELL_SECONDS", 0.0)
    pool = type("LosingAndHeld", (HeldPool, Losing), {})()
    bench = Bench(pool)
    threading.Timer(1.3, pool.release, (0, 1)).start()
    with bench.source, caplog.at_level(logging.WARNING):
        bench.take(1)
    assert "prompts [0, 1, 2, 3]; http://a answered prompt 3 7 s ago" in caplog.text


@pytest.mark.parametrize("version", [-1, 5])
def test_versions_that_cannot_be_are_refused(version: int) -> None:
    """Of an engine that was restarted, or that another run publishes to."""
    bench = Bench(FakePool(weight_version=version), max_age=0)
    with bench.source, pytest.raises(EngineError, match="weight versions 0 to 0, got"):
        bench.take(1)


def test_the_end_cancels_what_is_in_flight() -> None:
    pool = HeldPool()
    bench = Bench(pool)
    with bench.source:
        pool.release(0, 1)
        bench.take(1)
        wait_until(lambda: len(bench.started) == 4)
    assert sorted(pool.cancelled) == [2, 3]
    assert not any(each.name.startswith("sample ahead") for each in threading.enumerate())
