"""The gap on a fixed set of rollouts, without an engine, worked by hand."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.config import Config, EvalConfig
from megatron_rl.config.evaluation import FIXED_STEP
from megatron_rl.learner.batch.deal import unscored_samples
from megatron_rl.loop.fixed_gap import gap_figures, measure_fixed_gap
from megatron_rl.rollout.recording import write_step
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import judged, make_group, make_rollout, scored
from tests.fakes.learner import FakeLearner, FakeParallel
from tests.fakes.lost_pool import LostUntilRestored


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    assert name == "eval"
    return contextlib.nullcontext()


def test_figures_are_over_the_sampled_tokens() -> None:
    [sample] = unscored_samples([make_group(0, make_rollout(2, logprob=math.log(0.5)))])
    learned = torch.tensor([0.0, 0.0, math.log(0.25), math.log(0.625)])
    figures = gap_figures([(sample, learned)])
    assert figures["eval/fixed_gap/mean"] == pytest.approx((0.25 + 0.125) / 2, rel=1e-6)
    assert figures["eval/fixed_gap/max"] == pytest.approx(0.25, rel=1e-6)
    expected = (math.log(0.25) + math.log(0.625)) / 2
    assert figures["eval/fixed_logprob/mean"] == pytest.approx(expected, rel=1e-6)


def record(folder: Path) -> Config:
    """Two recorded groups of two, of which three sequences are scored."""
    groups = [judged(scored(index, 1.0, 0.0)) for index in range(2)]
    write_step(folder, FIXED_STEP, 0, groups, num_ranks=1)
    return Config(eval=EvalConfig(fixed_rollouts=str(folder), num_fixed_rollouts=3))


def test_the_engines_score_the_recorded_sequences(tmp_path: Path) -> None:
    config, pool, learner = record(tmp_path), FakePool(), FakeLearner(logprob=-0.25)
    link = SimpleNamespace(pool=pool)
    figures = measure_fixed_gap(learner, link, config, phase)
    assert len(pool.scored) == 3
    assert learner.log == ["score_samples 3"]
    # One sampled token a sequence, the third of it, to which the fake engine gives -0.08.
    assert figures["eval/fixed_gap/mean"] == pytest.approx(math.exp(-0.08) - math.exp(-0.25))
    assert figures["eval/fixed_logprob/mean"] == pytest.approx(-0.25)


def test_the_last_engine_is_lost_while_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, pool = record(tmp_path), FakePool()
    lost = LostUntilRestored(pool.score)
    monkeypatch.setattr(pool, "score", lost.score)
    link = SimpleNamespace(pool=pool)
    figures = measure_fixed_gap(FakeLearner(), link, config, phase, lost.restore)
    assert lost.told == ["none is left", ""]
    assert figures["eval/fixed_logprob/mean"] == pytest.approx(-0.5)


def test_other_ranks_take_part(tmp_path: Path) -> None:
    learner = FakeLearner(parallel=FakeParallel(rank=1, is_last_stage=False))
    assert measure_fixed_gap(learner, None, record(tmp_path), phase) == {}
    assert learner.log == ["score_samples 0"]
    assert learner.parallel.log == ["from_last_stage"]


def test_nothing_is_measured_without_a_set_or_engines(tmp_path: Path) -> None:
    learner, config = FakeLearner(), record(tmp_path)
    assert measure_fixed_gap(learner, None, Config(), phase) == {}
    assert measure_fixed_gap(learner, None, replace(config, replay="runs/a"), phase) == {}
    assert learner.log == []
