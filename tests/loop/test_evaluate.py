"""Evaluations without an engine: shares, seeds, records and rates, worked by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import Config, EvalConfig, RewardTerm, SamplingConfig
from megatron_rl.data.evaluation_sets import EvaluationSet, held_out_set
from megatron_rl.engine.requests import Sampler
from megatron_rl.errors import EngineError
from megatron_rl.loop.evaluate import Evaluator, evaluate_sets
from megatron_rl.loop.state import LoopState
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.records import Prompt, Rollout, RolloutGroup, Score
from megatron_rl.rollout.environment import EpisodeRequest
from megatron_rl.rollout.recording import read_step
from megatron_rl.rollout.seeds import sampling_seed
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import make_prompt, make_rollout, make_scores
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
    """Right for even prompts, according to the first of two verifiers; never to the other one."""
    scores = [make_scores(*[float(g.prompt.index % 2 == 0)] * len(g.rollouts)) for g in groups]
    return [
        tuple(
            replace(score, verifier_rewards=(("numeric", score.reward), ("exact", 0.0)))
            for score in of_group
        )
        for of_group in scores
    ]


# The held-out prompts have one verifier, those of the set "sums" two.
VERIFIERS = {
    "task": (RewardTerm(verifier="exact"),),
    "eval/sums": (RewardTerm(verifier="numeric"), RewardTerm(verifier="exact", weight=0.5)),
}
CONFIG = Config(eval=EvalConfig(num_samples=2))


def make_evaluator(
    folder: Path,
    environment: AnsweringEnvironment,
    *sets: EvaluationSet,
    replica: int = 0,
    num_replicas: int = 1,
) -> Evaluator:
    parallel = FakeParallel(dp_rank=replica, dp_size=num_replicas)
    return Evaluator(
        pool=FakePool(),
        environment=environment,
        score=score_by_index,
        score_texts=lambda pairs: [
            Score(reward=1.0, is_formatted=True, failure=None) for _ in pairs
        ],
        verifiers=VERIFIERS,
        sets=(held_out_set([make_prompt(index) for index in range(4)], CONFIG.eval), *sets),
        folder=folder,
        replica=replica,
        num_replicas=num_replicas,
        share=parallel.share,
        all_reduce=parallel.reducer(),
    )


STATE = LoopState(dual=DualVariable(0.1), step=5, published_version=5)


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    assert name == "eval"
    return contextlib.nullcontext()


def test_figures_and_the_record_of_an_evaluation(tmp_path: Path) -> None:
    environment = AnsweringEnvironment()
    evaluator = make_evaluator(tmp_path, environment)
    figures = evaluate_sets(evaluator, STATE, CONFIG, phase)
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
    evaluate_sets(make_evaluator(tmp_path / "a", whole), STATE, CONFIG, phase)
    evaluator = make_evaluator(tmp_path / "b", half, replica=1, num_replicas=2)
    evaluate_sets(evaluator, STATE, CONFIG, phase, with_constant_answer=True)
    assert [index for index, _ in half.asked] == [2, 3]
    seeds = {index: request.seed for index, request in whole.asked}
    assert {index: request.seed for index, request in half.asked} == {2: seeds[2], 3: seeds[3]}
    assert len(set(seeds.values())) == 4


def test_the_best_constant_answer_is_told_by_the_first_replica(tmp_path: Path) -> None:
    evaluator = make_evaluator(tmp_path, AnsweringEnvironment())
    figures = evaluate_sets(evaluator, STATE, CONFIG, phase, with_constant_answer=True)
    assert figures["eval/best_constant_answer"] == 1.0


def test_other_weights_than_those_published_are_an_error(tmp_path: Path) -> None:
    evaluator = make_evaluator(tmp_path, AnsweringEnvironment(version=4))
    with pytest.raises(EngineError, match=r"expected samples of weight version 5, got \[4\]"):
        evaluate_sets(evaluator, STATE, CONFIG, phase)


def test_ranks_without_an_evaluator_do_nothing() -> None:
    assert evaluate_sets(None, STATE, CONFIG, phase) == {}


def named(name: str, *indices: int, num_samples: int = 1, max_tokens: int = 9) -> EvaluationSet:
    return EvaluationSet(
        name=name,
        prompts=tuple(make_prompt(index, source=f"eval/{name}") for index in indices),
        num_samples=num_samples,
        pass_at=(1, num_samples),
        sampling=SamplingConfig(max_tokens=max_tokens),
    )


def test_named_sets_have_figures_records_and_samples_of_their_own(tmp_path: Path) -> None:
    environment = AnsweringEnvironment()
    sets = named("even", 0, 2, num_samples=3), named("all", 0, 1, 2, 3, max_tokens=7)
    figures = evaluate_sets(make_evaluator(tmp_path, environment, *sets), STATE, CONFIG, phase)
    assert (figures["eval/avg_at_2"], figures["eval/even/avg_at_3"]) == (0.5, 1.0)
    assert (figures["eval/all/avg_at_1"], figures["eval/all/pass_at_1"]) == (0.5, 0.5)
    assert {key for key in figures if key.count("/") == 1} == {
        "eval/avg_at_2",
        "eval/pass_at_2",
        "eval/mean_of_sets",
    }
    assert figures["eval/mean_of_sets"] == 0.75
    asked = [(index, request.num_samples) for index, request in environment.asked]
    assert asked == [(0, 2), (1, 2), (2, 2), (3, 2), (0, 3), (2, 3), *[(i, 1) for i in range(4)]]
    assert [request.sampling.max_tokens for _, request in environment.asked][-5:] == [9, *[7] * 4]
    for folder, indices in (("", [0, 1, 2, 3]), ("even", [0, 2]), ("all", [0, 1, 2, 3])):
        recorded = read_step(tmp_path / folder, 5)
        assert [each.group.prompt.index for each in recorded] == indices
        assert {each.group.prompt.source for each in recorded} == {
            f"eval/{folder}" if folder else "task"
        }


def test_the_verifiers_of_a_set_with_several_are_shown_apart(tmp_path: Path) -> None:
    sets = named("sums", 0, 1, 2, 4), named("other", 0)
    figures = evaluate_sets(
        make_evaluator(tmp_path, AnsweringEnvironment(), *sets), STATE, CONFIG, phase
    )
    assert {key: figures[key] for key in figures if "verifier" in key} == {
        "eval/sums/reward/verifier/numeric/mean": 0.75,
        "eval/sums/reward/verifier/exact/mean": 0.0,
    }


def test_the_held_out_prompts_alone_give_what_they_give_beside_sets(tmp_path: Path) -> None:
    alone, beside = AnsweringEnvironment(), AnsweringEnvironment()
    figures = evaluate_sets(make_evaluator(tmp_path, alone), STATE, CONFIG, phase)
    more = evaluate_sets(
        make_evaluator(tmp_path, beside, named("a", *range(50))), STATE, CONFIG, phase
    )
    assert {key: more[key] for key in figures} == figures
    assert beside.asked[:4] == alone.asked
    # The seeds of held-out prompts are those of step -1.
    assert [r.seed for _, r in alone.asked] == [sampling_seed(0, -1, index) for index in range(4)]


def test_each_replica_takes_its_share_of_every_set(tmp_path: Path) -> None:
    sets = named("three", 5, 6, 7), named("one", 0)
    whole, first, second = (AnsweringEnvironment() for _ in range(3))
    evaluate_sets(make_evaluator(tmp_path / "a", whole, *sets), STATE, CONFIG, phase)
    for replica, environment in enumerate((first, second)):
        evaluator = make_evaluator(
            tmp_path / "b", environment, *sets, replica=replica, num_replicas=2
        )
        evaluate_sets(evaluator, STATE, CONFIG, phase)
    assert [index for index, _ in first.asked] == [0, 1, 5]
    assert [index for index, _ in second.asked] == [2, 3, 6, 7, 0]
    # The same questions with the same seeds, whoever asks them.
    in_order = [*first.asked[:2], *second.asked[:2], first.asked[2], *second.asked[2:]]
    assert in_order == whole.asked
    assert [each.group.prompt.index for each in read_step(tmp_path / "b" / "three", 5)] == [5, 6, 7]
