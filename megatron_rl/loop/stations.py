"""What train.py does at each station, on the ranks that take part: advantage, evaluation, records.
Groups, scores and advantages are held by the heads of the replicas, each its own prompts; elsewhere
the lists are empty. Rollout and reward stand in sampling.py, the weight sync in publishing.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rl.config import ObjectiveConfig
from megatron_rl.learner.batch.deal import DealtBatch, pack_batch, recomputed_by_sample
from megatron_rl.learner.passes.forward import WHOLE
from megatron_rl.loop.report import Advantages, Groups, Scores, evaluation_metrics
from megatron_rl.loop.run import Run
from megatron_rl.objective.advantage import group_advantages
from megatron_rl.observe.metrics import reduce
from megatron_rl.records import JudgedGroup, Sample, SampledStep, Score, ScoredGroup
from megatron_rl.reward.score import best_constant_answer, rewards_of
from megatron_rl.rollout.live import check_versions, sample_groups
from megatron_rl.rollout.recording import write_recomputed, write_step
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.weights.huggingface import write_checkpoint

# Evaluation's seeds do not depend on the step: two evaluations differ by the weights alone.
EVAL_STEP = -1
UNSCORED = Score(reward=0.0, is_formatted=False, failure=None)


def advantages_of(objective: ObjectiveConfig, scores: Scores) -> list[list[float]]:
    """Group advantages: for every group, one a sample."""
    return [
        group_advantages(
            torch.tensor(rewards_of(of_group), dtype=torch.float64),
            epsilon=objective.advantage_epsilon,
            should_scale=objective.advantage_std,
        ).tolist()
        for of_group in scores
    ]


def make_samples(
    groups: Groups, scores: Scores, advantages: Advantages, is_kept: Sequence[Sequence[bool]]
) -> list[Sample]:
    """One Sample a rollout."""
    return [
        Sample(
            prompt_index=group.prompt.index,
            sample_index=index,
            rollout=rollout,
            reward=score.reward,
            advantage=advantage,
            is_kept=kept,
        )
        for group, of_group, of_advantages, of_kept in zip(
            groups, scores, advantages, is_kept, strict=True
        )
        for index, (rollout, score, advantage, kept) in enumerate(
            zip(group.rollouts, of_group, of_advantages, of_kept, strict=True)
        )
    ]


def unscored_samples(groups: Groups) -> list[Sample]:
    """One Sample a rollout of groups whose log-probs alone matter."""
    counts = [len(group.rollouts) for group in groups]
    return make_samples(
        groups,
        [[UNSCORED] * count for count in counts],
        [[0.0] * count for count in counts],
        [[True] * count for count in counts],
    )


def recompute_for_all(run: Run, samples: Sequence[Sample]) -> tuple[DealtBatch, list[torch.Tensor]]:
    """The learner's log-probs over the whole distribution of samples that rank 0 holds; a
    collective in which every replica computes them all.

    Returns:
        The packed samples, and on the last pipeline stage a [T] a row.
    """
    box = [samples]
    dist.broadcast_object_list(box, src=0, device=run.parallel.device)
    dealt = pack_batch(box[0], run.parallel, run.config.learner.tokens_per_micro_batch)
    return dealt, run.learner.recompute(dealt.batch.mini_batches[0], truncation=WHOLE)


def evaluate_held_out(run: Run, *, with_constant_answer: bool = False) -> dict[str, float]:
    """avg@k and pass@k on the held-out prompts, shared among the replicas, at the evaluation's own
    sampling settings; on the heads. Every sample goes to `rollouts/eval/`.
    """
    held_out = [] if run.is_replay else run.stream.held_out()
    if not held_out or not run.parallel.is_replica_head:
        return {}
    parallel, config = run.parallel, run.config.eval
    start, count = run.share(len(held_out))
    prompts = held_out[start : start + count]
    with run.stations.time("eval"):
        groups = sample_groups(
            run.pool,
            run.environment,
            prompts,
            config.sampling,
            num_samples=config.num_samples,
            seeds=[sampling_seed(run.config.loop.seed, EVAL_STEP, each.index) for each in prompts],
        )
        check_versions(groups, run.published_version)
        scores = run.scorer.score(groups)
        judged = [
            ScoredGroup(group=group, scores=of_group).without_judgement()
            for group, of_group in zip(groups, scores, strict=True)
        ]
        folder = run.run_dir / "rollouts" / "eval"
        write_step(folder, run.step, parallel.dp_rank, judged, num_ranks=parallel.dp_size)
        metrics = evaluation_metrics(groups, scores, config.num_samples)
        reduced = reduce(metrics, parallel.reducer())
        if with_constant_answer and parallel.rank == 0:
            _, share = best_constant_answer(held_out, run.scorer.score_texts)
            reduced["eval/best_constant_answer"] = share
    return reduced


def record_rollouts(
    run: Run,
    sampled: SampledStep,
    dealt: DealtBatch,
    recomputed: Sequence[Sequence[torch.Tensor]],
) -> None:
    """Every sample of the step into `rollouts/`, and the learner's log-probs of it."""
    if run.is_replay:
        return
    parallel, folder = run.parallel, run.run_dir / "rollouts"
    with run.stations.time("record"):
        if parallel.is_replica_head:
            write_step(
                folder,
                run.step,
                parallel.dp_rank,
                _judged_groups(sampled),
                num_ranks=parallel.dp_size,
            )
        if parallel.is_last_stage and parallel.tp_rank == 0:
            found = recomputed_by_sample(dealt, recomputed)
            write_recomputed(
                folder,
                run.step,
                parallel.dp_rank,
                prompt_index=[sample.prompt_index for sample, _ in found],
                sample_index=[sample.sample_index for sample, _ in found],
                lengths=[len(values) for _, values in found],
                recomputed_logprobs=torch.cat([torch.zeros(0), *(values for _, values in found)]),
            )


def _judged_groups(sampled: SampledStep) -> list[JudgedGroup]:
    return [
        JudgedGroup(
            group=group,
            scores=tuple(scores),
            overlong_penalties=tuple(penalties),
            advantages=tuple(advantages),
            is_kept=tuple(is_kept),
        )
        for group, scores, penalties, advantages, is_kept in zip(
            sampled.groups,
            sampled.scores,
            sampled.penalties,
            sampled.advantages,
            sampled.is_kept,
            strict=True,
        )
    ]


def save_hf_checkpoint(run: Run) -> None:
    """The final weights as a Hugging Face checkpoint in `<run_dir>/huggingface`; a collective."""
    if not run.config.checkpoint.save_hf:
        return
    with run.stations.time("save"):
        if run.parallel.rank == 0:
            folder, tensors = run.run_dir / "huggingface", run.learner.full_tensors()
            write_checkpoint(folder, tensors, like=run.config.model.path)
        else:
            run.learner.give_tensors()
        dist.barrier()
