"""The decision whether an update stays, without engines and without a model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.config import AcceptanceConfig, Config, ObjectiveConfig
from megatron_rl.loop.acceptance import Acceptance, estimates, first_kept
from megatron_rl.records import SampledStep
from tests.fakes.groups import judged, make_group, make_rollout, make_scores, scored
from tests.fakes.learner import FakeLearner, FakeParallel
from tests.fakes.lost_pool import LostUntilRestored

PHASES = ("acceptance",)


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    assert name in PHASES
    return contextlib.nullcontext()


@contextlib.contextmanager
def asleep(log: list[str]) -> Iterator[None]:
    log.append("sleep")
    yield
    log.append("wake")


class FakeEngines:
    """Score every token with one log-prob, and 0.0 the first."""

    def __init__(self, logprob: float) -> None:
        self.logprob = logprob
        self.scored: list[tuple[int, ...]] = []

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        self.scored += [tuple(each) for each in sequences]
        return [(0.0, *(self.logprob,) * (len(each) - 1)) for each in sequences]


class FakeRestorePoint:
    def __init__(self, log: list[str]) -> None:
        self.copy = lambda: log.append("copy")
        self.restore = lambda: log.append("restore")


def config_of(**settings: Any) -> Config:
    return Config(objective=ObjectiveConfig(acceptance=AcceptanceConfig(enabled=True, **settings)))


def acceptance_of(
    log: list[str], learner: FakeLearner, engines: FakeEngines | None, **settings: Any
) -> Acceptance:
    def publish() -> dict[str, float]:
        log.append("publish")
        return {"sync/probe_gap/mean": 0.25}

    return Acceptance(
        learner,
        None if engines is None else SimpleNamespace(pool=engines),
        publish,
        config_of(**settings),
        phase,
        asleep=partial(asleep, log),
        restore_point=FakeRestorePoint(log),
    )


def step_of(*advantages: float) -> SampledStep:
    """One group, sampled with p_inf = 1/2; a response of one token for each advantage."""
    rollouts = [make_rollout(1, logprob=math.log(0.5)) for _ in advantages]
    group = judged(scored(7, *(0.0,) * len(advantages)), *advantages)
    group = replace(group, group=make_group(7, *rollouts))
    return SampledStep(groups=(group,), num_prompts=1, num_rounds=1)


def test_an_update_that_helps_the_learner_alone_is_taken_back() -> None:
    """A = 1 and -0.5. The learner's weights are 1.5, so J = 0.375; the engine's are 1, J = 0.25."""
    log: list[str] = []
    learner, engines = FakeLearner(logprob=math.log(0.75)), FakeEngines(math.log(0.5))
    acceptance = acceptance_of(log, learner, engines, max_loss=0.1)
    acceptance.copy_state()
    assert log == ["copy"]
    figures = acceptance.decide(step_of(1.0, -0.5))
    assert log == ["copy", "sleep", "restore", "wake", "publish"]
    assert len(engines.scored) == 2 and learner.log == ["score_samples 2"]
    assert figures == {
        "acceptance/learner_objective/mean": pytest.approx(0.375, rel=1e-6),
        "acceptance/engine_objective/mean": pytest.approx(0.25, rel=1e-6),
        "acceptance/loss": pytest.approx(0.125, rel=1e-6),
        "acceptance/is_taken_back": 1.0,
        "sync/probe_gap/mean": 0.25,  # of the second publication
    }


@pytest.mark.parametrize(
    ("max_loss", "is_taken_back"), [(0.13, False), (0.12, True), (-1.0, True), (1.0, False)]
)
def test_the_bound_decides(max_loss: float, is_taken_back: bool) -> None:
    log: list[str] = []
    learner, engines = FakeLearner(logprob=math.log(0.75)), FakeEngines(math.log(0.5))
    figures = acceptance_of(log, learner, engines, max_loss=max_loss).decide(step_of(1.0, -0.5))
    assert figures["acceptance/is_taken_back"] == is_taken_back
    assert log == (["sleep", "restore", "wake", "publish"] if is_taken_back else [])


def test_the_last_engine_is_lost_while_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, and asked again; every rank takes part in bringing it back."""
    learner, engines = FakeLearner(logprob=math.log(0.75)), FakeEngines(math.log(0.5))
    acceptance = acceptance_of([], learner, engines, max_loss=0.2)
    lost = LostUntilRestored(engines.score)
    monkeypatch.setattr(engines, "score", lost.score)
    monkeypatch.setattr(acceptance, "_restore", lost.restore)
    figures = acceptance.decide(step_of(1.0, -0.5))
    assert lost.told == ["none is left", ""]
    assert figures["acceptance/loss"] == pytest.approx(0.125, rel=1e-6)


def test_an_engine_that_gains_more_than_the_learner_keeps_the_update() -> None:
    log: list[str] = []
    learner, engines = FakeLearner(logprob=math.log(0.5)), FakeEngines(math.log(0.75))
    figures = acceptance_of(log, learner, engines, max_loss=0.0).decide(step_of(1.0, -0.5))
    assert figures["acceptance/loss"] == pytest.approx(-0.125, rel=1e-6)
    assert (figures["acceptance/is_taken_back"], log) == (0.0, [])


def test_the_cap_bounds_the_weights() -> None:
    learner, engines = FakeLearner(logprob=math.log(1.0)), FakeEngines(math.log(0.5))
    figures = acceptance_of([], learner, engines, cap=1.25).decide(step_of(1.0))
    assert figures["acceptance/learner_objective/mean"] == pytest.approx(1.25)


def test_a_loss_that_is_not_a_number_is_taken_back() -> None:
    log: list[str] = []
    learner, engines = FakeLearner(logprob=math.nan), FakeEngines(math.log(0.5))
    acceptance_of(log, learner, engines).decide(step_of(1.0))
    assert log == ["sleep", "restore", "wake", "publish"]


def test_only_sampled_tokens_count() -> None:
    """Two tokens of A = 1 with weights 1 and 2, one of A = -3 with weight 1/2; no prompt's."""
    long = make_rollout(2, logprob=math.log(0.25))
    short = make_rollout(1, logprob=math.log(0.5))
    group = replace(judged(scored(7, 1.0, 0.0), 1.0, -3.0), group=make_group(7, long, short))
    first, second = group.samples()
    learned = [
        (first, torch.tensor([0.0, -7.0, math.log(0.25), math.log(0.5)])),
        (second, torch.tensor([0.0, -7.0, math.log(0.25)])),
    ]
    served = {(7, 0): first.rollout.rollout_logprobs, (7, 1): second.rollout.rollout_logprobs}
    figures = estimates(learned, served, cap=2.0)
    assert figures["acceptance/learner_objective/mean"] == pytest.approx((1 + 2 - 1.5) / 3)
    assert figures["acceptance/engine_objective/mean"] == pytest.approx((1 + 1 - 3) / 3)


def test_the_first_kept_responses_are_scored() -> None:
    empty = make_rollout(0)
    groups = tuple(
        replace(judged(scored(index, 1.0, 0.0), 1.0, -1.0), is_kept=(index != 3, True))
        for index in (3, 4)
    )
    silent = replace(
        judged(scored(5, 1.0), 1.0), group=make_group(5, empty), scores=make_scores(1.0)
    )
    sampled = SampledStep(groups=(*groups, silent), num_prompts=3, num_rounds=1)
    keys = [
        (each.prompt_index, each.sample_index)
        for each in first_kept(sampled.samples(), 8, FakeParallel())
    ]
    assert keys == [(3, 1), (4, 0), (4, 1)]
    assert len(first_kept(sampled.samples(), 2, FakeParallel())) == 2


def test_without_a_kept_response_the_update_stays() -> None:
    log: list[str] = []
    engines = FakeEngines(-1.0)
    nothing = SampledStep(groups=(), num_prompts=0, num_rounds=1)
    learner = FakeLearner()
    figures = acceptance_of(log, learner, engines).decide(nothing)
    assert figures == {"acceptance/is_taken_back": 0.0}
    assert (log, engines.scored, learner.log) == ([], [], [])


def test_another_rank_does_what_rank_0_found() -> None:
    """It has no engines, and its own estimate does not count."""
    log: list[str] = []
    parallel = FakeParallel(rank=1)
    found = {"acceptance/loss": 0.5}
    answers = iter([{(7, 0): (0.0, 0.0, -0.5)}, found])
    parallel.from_first_rank = lambda value: next(answers)  # type: ignore[method-assign]
    learner = FakeLearner(parallel=parallel, logprob=math.log(0.5))
    figures = acceptance_of(log, learner, None, max_loss=0.1).decide(step_of(1.0))
    assert log == ["sleep", "restore", "wake", "publish"]
    assert figures["acceptance/loss"] == 0.5


def test_switched_off_nothing_is_copied_or_scored() -> None:
    learner, log = FakeLearner(), list[str]()
    off = Acceptance(learner, None, dict, Config(), phase, asleep=partial(asleep, log))
    off.copy_state()
    assert off.decide(step_of(1.0)) == {}
    assert (learner.log, learner.parallel.log, log) == ([], [], [])
