"""Evaluations without an engine: shares, seeds, records and rates, worked by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_rl.config import Config, EvalConfig
from megatron_rl.engine.requests import Sampler
from megatron_rl.errors import EngineError
from megatron_rl.loop.evaluate import Evaluator, evaluate_held_out, evaluation_metrics
from megatron_rl.loop.state import LoopState
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.observe.metrics import reduce
from megatron_rl.records import Prompt, Rollout, RolloutGroup, Score, ScoredGroup
from megatron_rl.rollout.environment import EpisodeRequest
from megatron_rl.rollout.recording import read_step
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import make_group, make_prompt, make_rollout, make_scores
from tests.fakes.learner import FakeParallel


class AnsweringEnvironment:
    """Answers of the version that the engines serve; notes what it is asked."""

    def __init__(self, *, version: int = 5) -> None:
        self.asked: list[tuple[int, EpisodeRequest]] = []
        self._version = version

    async def rollouts(
        self, prompt: Prompt, request: EpisodeRequest, sampler: Sampler
    ) -> tuple[Rollout, ...]:
        self.asked.append((prompt.index, request))
        return tuple(make_rollout(version=self._version) for _ in range(request.num_samples))


def score_by_index(groups: Sequence[RolloutGroup]) -> list[tuple[Score, ...]]:
    """Right for even prompts."""
    return [make_scores(*[float(g.prompt.index % 2 == 0)] * len(g.rollouts)) for g in groups]


def make_evaluator(
    folder: Path, environment: AnsweringEnvironment, *, replica: int = 0, num_replicas: int = 1
) -> Evaluator:
    parallel = FakeParallel(dp_rank=replica, dp_size=num_replicas)
    return Evaluator(
        pool=FakePool(),
        environment=environment,
        score=score_by_index,
        score_texts=lambda pairs: [
            Score(reward=1.0, is_formatted=True, failure=None) for _ in pairs
        ],
        held_out=tuple(make_prompt(index) for index in range(4)),
        folder=folder,
        replica=replica,
        num_replicas=num_replicas,
        share=parallel.share,
        all_reduce=parallel.reducer(),
    )


STATE = LoopState(dual=DualVariable(0.1), step=5, published_version=5)
CONFIG = Config(eval=EvalConfig(num_samples=2))


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    assert name == "eval"
    return contextlib.nullcontext()


def test_figures_and_the_record_of_an_evaluation(tmp_path: Path) -> None:
    environment = AnsweringEnvironment()
    evaluator = make_evaluator(tmp_path, environment)
    figures = evaluate_held_out(evaluator, STATE, CONFIG, phase)
    assert figures["eval/avg_at_2"] == 0.5
    assert figures["eval/pass_at_2"] == 0.5
    assert "eval/best_constant_answer" not in figures
    assert [index for index, _ in environment.asked] == [0, 1, 2, 3]
    assert all(request.sampling == CONFIG.eval.sampling for _, request in environment.asked)
    recorded = read_step(tmp_path, 5)
    assert [each.group.prompt.index for each in recorded] == [0, 1, 2, 3]
    assert [score.reward for each in recorded for score in each.scores] == [1, 1, 0, 0] * 2


def test_each_replica_takes_its_share_and_seeds_do_not_depend_on_it(tmp_path: Path) -> None:
    whole, half = AnsweringEnvironment(), AnsweringEnvironment()
    evaluate_held_out(make_evaluator(tmp_path / "a", whole), STATE, CONFIG, phase)
    evaluator = make_evaluator(tmp_path / "b", half, replica=1, num_replicas=2)
    evaluate_held_out(evaluator, STATE, CONFIG, phase, with_constant_answer=True)
    assert [index for index, _ in half.asked] == [2, 3]
    seeds = {index: request.seed for index, request in whole.asked}
    assert {index: request.seed for index, request in half.asked} == {2: seeds[2], 3: seeds[3]}
    assert len(set(seeds.values())) == 4


def test_the_best_constant_answer_is_told_by_the_first_replica(tmp_path: Path) -> None:
    evaluator = make_evaluator(tmp_path, AnsweringEnvironment())
    figures = evaluate_held_out(evaluator, STATE, CONFIG, phase, with_constant_answer=True)
    assert figures["eval/best_constant_answer"] == 1.0


def test_other_weights_than_those_published_are_an_error(tmp_path: Path) -> None:
    evaluator = make_evaluator(tmp_path, AnsweringEnvironment(version=4))
    with pytest.raises(EngineError, match=r"expected samples of weight version 5, got \[4\]"):
        evaluate_held_out(evaluator, STATE, CONFIG, phase)


def test_ranks_without_an_evaluator_do_nothing() -> None:
    assert evaluate_held_out(None, STATE, CONFIG, phase) == {}


def test_rates_of_two_prompts_with_three_samples() -> None:
    cut = make_rollout(finish_reason="length")
    groups = [
        make_group(0, make_rollout(), cut, make_rollout()),
        make_group(1, *[make_rollout()] * 3),
    ]
    # What could not be scored is a failure, and counts in no other rate.
    failed = tuple(
        Score(reward=reward, is_formatted=False, failure="timeout") for reward in (0.5, 0.0, 0.0)
    )
    scored = [
        ScoredGroup(group=groups[0], scores=make_scores(1.0, 0.0, 1.0)),
        ScoredGroup(group=groups[1], scores=failed),
    ]
    metrics = reduce(evaluation_metrics(scored, 3), lambda values, operation: values)
    assert metrics == pytest.approx(
        {
            "eval/avg_at_3": 2 / 3,
            "eval/pass_at_3": 1.0,
            "eval/reward/mean": 2 / 3,
            "eval/format_rate/mean": 2 / 3,
            "eval/truncation_rate/mean": 1 / 6,
            "eval/failure_rate/mean": 3 / 6,
        }
    )


def test_a_replica_without_prompts_takes_part() -> None:
    """More replicas than held-out prompts: equal keys on every rank, or the reduction hangs."""
    one = ScoredGroup(group=make_group(0, make_rollout()), scores=make_scores(1.0))
    some, none = evaluation_metrics([one], 1), evaluation_metrics([], 1)
    assert some.keys() == none.keys()
    assert reduce(none, lambda values, operation: values) == {}
