"""Evaluation of the weights that the engines serve, on every set of a run. The head of each replica
evaluates its own share of each set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_rl.config import Config, RewardTerm
from megatron_rl.data.evaluation_sets import EvaluationSet
from megatron_rl.engine.requests import EnginePool
from megatron_rl.loop.evaluation_metrics import HELD_OUT, evaluation_metrics, prefix_of
from megatron_rl.loop.restore import Restore, ask_engines, no_engines_to_restore
from megatron_rl.loop.state import LoopState
from megatron_rl.observe.metrics import AllReduce, Metric, reduce
from megatron_rl.observe.stopwatch import Phase
from megatron_rl.records import Prompt, RolloutGroup, Score, ScoredGroup
from megatron_rl.reward.registry import verifiers_apart
from megatron_rl.reward.score import best_constant_answer
from megatron_rl.rollout.environment import Environment, EpisodeRequest
from megatron_rl.rollout.live import check_versions, run_episodes
from megatron_rl.rollout.recording import write_step
from megatron_rl.rollout.seeds import evaluation_seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Everything that the head of a replica needs for an evaluation.

    Example: `Evaluator(pool=HttpEnginePool(...), environment=SingleTurn(...), score=scorer.score,
    score_texts=scorer.score_texts, verifiers={"aime24": (RewardTerm(verifier="math_verify"),)},
    sets=(EvaluationSet(...),), folder=Path("runs/a/rollouts/eval"), replica=0, num_replicas=2,
    share=share, all_reduce=parallel.reducer())`.
    """

    pool: EnginePool
    environment: Environment
    score: Callable[[Sequence[RolloutGroup]], Sequence[tuple[Score, ...]]]
    score_texts: Callable[[Sequence[tuple[Prompt, str]]], Sequence[Score]]
    # by the source of a prompt; of a source with several, each one's rewards are shown
    verifiers: Mapping[str, Sequence[RewardTerm]]
    sets: tuple[EvaluationSet, ...]  # with the prompts of all replicas together
    folder: Path  # where the samples are recorded; those of a named set in a folder of its name
    replica: int
    num_replicas: int
    share: Callable[[int], tuple[int, int]]  # number of items -> first and number of this replica's
    all_reduce: AllReduce  # over the heads of the replicas


def evaluate_sets(
    evaluator: Evaluator | None,
    state: LoopState,
    config: Config,
    phase: Phase,
    *,
    with_constant_answer: bool = False,
    restore: Restore = no_engines_to_restore,
) -> dict[str, float]:
    """Sample, score and record every set. A collective over all ranks.

    Args:
        evaluator: on the heads of the replicas; None elsewhere, and in a replay.
        with_constant_answer: on the first replica, add `eval/best_constant_answer`: the share of
            the held-out prompts that the best single answer, given to all of them, would solve.
        restore: see `loop/restore.py`.

    Returns:
        The figures of `evaluation_metrics` and `mean_of_sets`; empty without an evaluator or a
        set.

    Raises:
        EngineError: an engine failed, or does not serve the weights that were published last.
    """
    groups = _sample(evaluator, config, phase, restore)
    if evaluator is None or not evaluator.sets:
        return {}
    with phase("eval"):
        check_versions(groups, state.published_version)
        figures = _judge(evaluator, groups, state)
        figures |= mean_of_sets(figures, evaluator.sets)
        held_out = [each.prompts for each in evaluator.sets if each.name == HELD_OUT]
        if with_constant_answer and evaluator.replica == 0 and held_out:
            _, accuracy = best_constant_answer(held_out[0], evaluator.score_texts)
            figures["eval/best_constant_answer"] = accuracy
        return figures


def mean_of_sets(figures: dict[str, float], sets: Sequence[EvaluationSet]) -> dict[str, float]:
    """`eval/mean_of_sets`, the mean of the named sets' avg@k; empty unless there are several."""
    keys = [
        f"{prefix_of(each.name)}avg_at_{each.num_samples}" for each in sets if each.name != HELD_OUT
    ]
    if len(keys) < 2 or not all(key in figures for key in keys):
        return {}
    return {"eval/mean_of_sets": sum(figures[key] for key in keys) / len(keys)}


def _sample(
    evaluator: Evaluator | None, config: Config, phase: Phase, restore: Restore
) -> list[RolloutGroup]:
    """The groups of this replica's share of every set, one set after another."""
    finished: dict[int, RolloutGroup] = {}

    def ask() -> list[RolloutGroup]:
        if evaluator is None or not evaluator.sets:
            return []
        prompts, requests = _requests(evaluator, config)
        # All sets together, so that the engines need not wait for the longest responses of each.
        return run_episodes(evaluator.pool, evaluator.environment, prompts, requests, finished)

    return ask_engines(ask, restore, partial(phase, "eval")) or []


def _requests(evaluator: Evaluator, config: Config) -> tuple[list[Prompt], list[EpisodeRequest]]:
    """This replica's prompts of every set, and what is asked of each."""
    seeds = evaluation_seeds(
        config.loop.seed,
        {each.name: [prompt.index for prompt in each.prompts] for each in evaluator.sets},
    )
    prompts: list[Prompt] = []
    requests: list[EpisodeRequest] = []
    for each in evaluator.sets:
        start, count = evaluator.share(len(each.prompts))
        own = slice(start, start + count)
        prompts += each.prompts[own]
        requests += [
            EpisodeRequest(num_samples=each.num_samples, seed=seed, sampling=each.sampling)
            for seed in seeds[each.name][own]
        ]
    return prompts, requests


def _judge(
    evaluator: Evaluator, groups: Sequence[RolloutGroup], state: LoopState
) -> dict[str, float]:
    """Score and record the groups; a collective over the heads of the replicas."""
    scored = iter(
        [
            ScoredGroup(group=group, scores=tuple(scores))
            for group, scores in zip(groups, evaluator.score(groups), strict=True)
        ]
    )
    metrics: dict[str, Metric] = {}
    for each in evaluator.sets:
        _, count = evaluator.share(len(each.prompts))
        of_set = [next(scored) for _ in range(count)]
        write_step(
            evaluator.folder / each.name,
            state.step,
            evaluator.replica,
            [one.without_judgement() for one in of_set],
            num_ranks=evaluator.num_replicas,
        )
        sources = {prompt.source for prompt in each.prompts}
        verifiers = {name: of for name, of in evaluator.verifiers.items() if name in sources}
        metrics |= evaluation_metrics(
            of_set,
            each.num_samples,
            pass_at=each.pass_at,
            name=each.name,
            verifiers=verifiers_apart(verifiers),
        )
    return reduce(metrics, evaluator.all_reduce)
