"""The gap on a fixed set of rollouts, without an engine, worked by hand."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rl.config import Config, EvalConfig
from megatron_rl.loop.fixed_gap import gap_figures, measure_fixed_gap
from megatron_rl.rollout.live import unscored_samples
from megatron_rl.rollout.recording import write_step
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import judged, make_group, make_rollout, scored
from tests.fakes.learner import FakeLearner
from tests.loop.test_publish import make_link


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    assert name == "eval"
    return contextlib.nullcontext()


def test_figures_are_over_the_sampled_tokens() -> None:
    samples = unscored_samples([make_group(0, make_rollout(2, logprob=math.log(0.5)))])
    learned = torch.tensor([0.0, 0.0, math.log(0.25), math.log(0.625)])
    figures = gap_figures([(samples[0], learned)])
    assert figures["eval/fixed_gap/mean"] == pytest.approx((0.25 + 0.125) / 2, rel=1e-6)
    assert figures["eval/fixed_gap/max"] == pytest.approx(0.25, rel=1e-6)
    expected = (math.log(0.25) + math.log(0.625)) / 2
    assert figures["eval/fixed_logprob/mean"] == pytest.approx(expected, rel=1e-6)
