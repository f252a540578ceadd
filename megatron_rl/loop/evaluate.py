"""avg@k and pass@k on the held-out prompts. The head of each replica evaluates its own share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.engine.requests import EnginePool
from megatron_rl.loop.state import LoopState
from megatron_rl.observe.metrics import AllReduce, Metric, mean_of, reduce
from megatron_rl.observe.stopwatch import Phase
from megatron_rl.records import Prompt, RolloutGroup, Score, ScoredGroup
from megatron_rl.reward.score import best_constant_answer
from megatron_rl.rollout.environment import Environment
from megatron_rl.rollout.live import check_versions, sample_groups
from megatron_rl.rollout.recording import write_step
from megatron_rl.rollout.seeds import sampling_seed

# All evaluations use the seeds of this step, so that two of them differ only in the weights.
EVAL_STEP = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Everything that the head of a replica needs for an evaluation.

    Example: `Evaluator(pool=HttpEnginePool(...), environment=SingleTurn(...), score=scorer.score,
    score_texts=scorer.score_texts, held_out=(Prompt(...),), folder=Path("runs/a/rollouts/eval"),
    replica=0, num_replicas=2, share=share, all_reduce=parallel.reducer())`.
    """

    pool: EnginePool
    environment: Environment
    score: Callable[[Sequence[RolloutGroup]], Sequence[tuple[Score, ...]]]
    score_texts: Callable[[Sequence[tuple[Prompt, str]]], Sequence[Score]]
    held_out: tuple[Prompt, ...]  # of all replicas together
    folder: Path  # where the samples are recorded
    replica: int
    num_replicas: int
    share: Callable[[int], tuple[int, int]]  # number of items -> first and number of this replica's
    all_reduce: AllReduce  # over the heads of the replicas


def evaluate_held_out(
    evaluator: Evaluator | None,
    state: LoopState,
    config: Config,
    phase: Phase,
    *,
    with_constant_answer: bool = False,
) -> dict[str, float]:
    """Sample, score and record the held-out prompts; a collective over the heads of the replicas.

    Args:
        evaluator: on the heads of the replicas; None elsewhere, and in a replay.
        with_constant_answer: on the first replica, add `eval/best_constant_answer`: the share of
            prompts that the best single answer, given to all of them, would solve.

    Returns:
        The figures of `evaluation_metrics`; empty without an evaluator or held-out prompts.

    Raises:
        EngineError: an engine failed, or does not serve the weights that were published last.
    """
    if evaluator is None or not evaluator.held_out:
        return {}
    with phase("eval"):
        return _evaluate(evaluator, state, config, with_constant_answer=with_constant_answer)


def _evaluate(
    evaluator: Evaluator, state: LoopState, config: Config, *, with_constant_answer: bool
) -> dict[str, float]:
    start, count = evaluator.share(len(evaluator.held_out))
    prompts = evaluator.held_out[start : start + count]
    num_samples = config.eval.num_samples
    groups = sample_groups(
        evaluator.pool,
        evaluator.environment,
        prompts,
        config.eval.sampling,
        num_samples=num_samples,
        seeds=[sampling_seed(config.loop.seed, EVAL_STEP, prompt.index) for prompt in prompts],
    )
    check_versions(groups, state.published_version)
    scored = [
        ScoredGroup(group=group, scores=tuple(scores))
        for group, scores in zip(groups, evaluator.score(groups), strict=True)
    ]
    write_step(
        evaluator.folder,
        state.step,
        evaluator.replica,
        [each.without_judgement() for each in scored],
        num_ranks=evaluator.num_replicas,
    )
    figures = reduce(evaluation_metrics(scored, num_samples), evaluator.all_reduce)
    if with_constant_answer and evaluator.replica == 0:
        _, accuracy = best_constant_answer(evaluator.held_out, evaluator.score_texts)
        figures["eval/best_constant_answer"] = accuracy
    return figures


def evaluation_metrics(scored: Sequence[ScoredGroup], num_samples: int) -> dict[str, Metric]:
    """avg@k, pass@k and the rates of one replica's share of the held-out prompts.

    A response that a verifier could not score counts as a failure and enters no other rate except
    the truncation rate.
    """
    rollouts = [rollout for each in scored for rollout in each.group.rollouts]
    every = [score for each in scored for score in each.scores]
    known = [[score for score in each.scores if score.failure is None] for each in scored]
    all_known = [score for scores in known for score in scores]
    return {
        f"eval/avg_at_{num_samples}": mean_of([score.is_correct for score in all_known]),
        f"eval/pass_at_{num_samples}": mean_of(
            [any(score.is_correct for score in scores) for scores in known if scores]
        ),
        "eval/reward/mean": mean_of([score.reward for score in all_known]),
        "eval/format_rate/mean": mean_of([score.is_formatted for score in all_known]),
        "eval/truncation_rate/mean": mean_of([each.is_truncated for each in rollouts]),
        "eval/failure_rate/mean": mean_of([score.failure is not None for score in every]),
    }
