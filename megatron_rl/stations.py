"""What train.py does at each station, on the ranks that take part: rollout, reward, advantage,
weight sync, evaluation, records. Groups, scores and advantages are held by the heads of the
replicas, each its own prompts; elsewhere the lists are empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_rl.batch import DealtBatch, pack_rows, recomputed_by_sample
from megatron_rl.errors import DataError, SyncError
from megatron_rl.evaluate import evaluate
from megatron_rl.learner.model import DTYPES
from megatron_rl.objective.advantage import group_advantages
from megatron_rl.observe.metrics import Max, Mean, Metric, Sum, reduce
from megatron_rl.records import Rollout, RolloutGroup, Sample, Score
from megatron_rl.reward.score import best_constant_answer, rewards_of
from megatron_rl.rollout.client import sampling_seed
from megatron_rl.rollout.recording import read_step, write_recomputed, write_step
from megatron_rl.run import Run
from megatron_rl.sync.probe import check_parity
from megatron_rl.sync.wire import TensorSpec
from megatron_rl.weights.huggingface import write_checkpoint

Groups = Sequence[RolloutGroup]
Scores = Sequence[Sequence[Score]]
Advantages = Sequence[Sequence[float]]


def rollout_and_score(run: Run) -> tuple[Groups, Scores]:
    """This replica's prompts of the step, sampled and scored; or the recorded ones of a replay."""
    if not run.parallel.is_replica_head:
        return [], []
    start, count = run.share(run.config.loop.prompts_per_step)
    if run.is_replay:
        return _recorded_groups(run, start, count)
    prompts = run.stream.prompts(run.next_prompt + start, count)
    seeds = [sampling_seed(run.config.loop.seed, run.step, prompt.index) for prompt in prompts]
    with run.stations.time("rollout"):
        groups = run.client.generate(
            prompts,
            run.config.rollout.sampling,
            num_samples=run.config.loop.samples_per_prompt,
            seeds=seeds,
        )
    with run.stations.time("reward"):
        return groups, run.scorer.score(groups)


def _recorded_groups(run: Run, start: int, count: int) -> tuple[Groups, Scores]:
    groups, scores = read_step(run.replay_dir, run.step)
    expected = run.config.loop.prompts_per_step, run.config.loop.samples_per_prompt
    got = len(groups), len(groups[0].rollouts) if groups else 0
    if got != expected or groups[0].prompt.index != run.next_prompt:
        raise DataError(
            f"replay={run.replay_dir}: expected step {run.step} to hold {expected[0]} prompts "
            "from prompt "
            f"{run.next_prompt} on with {expected[1]} samples each (loop.prompts_per_step, "
            "loop.samples_per_prompt), "
            f"got {got[0]} with {got[1]}"
        )
    return groups[start : start + count], scores[start : start + count]


def advantages_of(run: Run, scores: Scores) -> list[list[float]]:
    """Group advantages: for every group, one a sample."""
    epsilon = run.config.objective.advantage_epsilon
    return [
        group_advantages(
            torch.tensor(rewards_of(of_group), dtype=torch.float64), epsilon=epsilon
        ).tolist()
        for of_group in scores
    ]


def make_samples(groups: Groups, scores: Scores, advantages: Advantages) -> list[Sample]:
    """One Sample a rollout."""
    return [
        Sample(
            prompt_index=group.prompt.index,
            sample_index=index,
            rollout=rollout,
            reward=score.reward,
            advantage=advantage,
        )
        for group, of_group, of_advantages in zip(groups, scores, advantages, strict=True)
        for index, (rollout, score, advantage) in enumerate(
            zip(group.rollouts, of_group, of_advantages, strict=True)
        )
    ]


def publish_weights(run: Run) -> dict[str, float]:
    """The learner's weights into every engine as version `run.step`, and the parity probe.

    Returns the probe's figures, on every rank. Nothing is sampled before this has returned.
    """
    if run.is_replay:
        return {}
    with run.stations.time("sync"):
        tensors = run.learner.full_tensors()
        if run.parallel.rank == 0:
            try:
                report = run.publisher.publish(_specs(run), tensors, version=run.step)
            except SyncError:
                run.check_engines_after_failure()
                raise
            line = {
                "version": report.version,
                "bytes": report.num_bytes,
                "published": report.checksum,
                "received": report.received,
                "seconds": report.seconds,
            }
            with (run.run_dir / "sync.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        else:
            for _ in tensors:
                pass
        return _probe(run)


def _specs(run: Run) -> list[TensorSpec]:
    dtype = DTYPES[run.config.model.dtype]
    return [
        TensorSpec(name=name, dtype=dtype, shape=shape)
        for name, shape in run.learner.tensor_shapes()
    ]


def _probe(run: Run) -> dict[str, float]:
    """A few samples from every engine, compared with the learner's log-probs of the same tokens."""
    sync, sampling = run.config.sync, run.config.rollout.sampling
    if sync.probe_num_tokens == 0:
        return {}
    box: list[object] = [None]
    if run.parallel.rank == 0:
        prompts = run.stream.prompts(
            0, len(run.addresses) * max(2, sync.probe_num_tokens // sampling.max_tokens)
        )
        groups = run.client.generate(
            prompts,
            sampling,
            num_samples=2,
            seeds=[sampling_seed(0, run.step, p.index) for p in prompts],
        )
        box = [groups]
    dist.broadcast_object_list(box, src=0, device=run.parallel.device)
    groups = box[0]
    neutral = [[Score(reward=0.0, is_formatted=False, failure=None)] * 2] * len(groups)
    samples = make_samples(groups, neutral, [[0.0] * 2] * len(groups))
    rows = pack_rows(samples, run.parallel, run.config.learner.tokens_per_micro_batch)
    recomputed = run.learner.recompute(rows)
    figures = {}
    if run.parallel.is_last_stage:
        kept = [row.loss_mask for row in rows]
        report = check_parity(
            torch.cat([row.rollout_logprobs[mask] for row, mask in zip(rows, kept)]),
            torch.cat([values[mask] for values, mask in zip(recomputed, kept)]),
            engine_dtype=run.config.rollout.dtype,
            learner_dtype=run.config.model.dtype,
            tolerance=sync.probe_tolerance,
        )
        figures = {
            "sync/probe_gap/mean": report.mean_probability_gap,
            "sync/probe_gap/max": report.max_probability_gap,
            "sync/probe_relative_logprob_gap/max": report.max_relative_logprob_gap,
        }
    return run.parallel.from_last_stage(figures)


def evaluate_held_out(run: Run, *, with_constant_answer: bool = False) -> dict[str, float]:
    """avg@k and pass@k on the held-out prompts, shared among the replicas; on their heads."""
    if run.is_replay or not run.parallel.is_replica_head:
        return {}
    held_out = run.stream.held_out()
    if not held_out:
        return {}
    start, count = run.share(len(held_out))
    with run.stations.time("eval"):
        metrics = evaluate(
            run.client,
            run.scorer,
            held_out[start : start + count],
            run.config.eval,
            seed=run.config.loop.seed,
        )
        reduced = reduce(metrics, run.parallel.reducer())
        if with_constant_answer and run.parallel.rank == 0:
            reduced["eval/best_constant_answer"] = best_constant_answer(
                held_out, run.scorer.score_texts
            )[1]
    return reduced


def record_rollouts(
    run: Run,
    groups: Groups,
    scores: Scores,
    advantages: Advantages,
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
                groups,
                scores,
                advantages,
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


def write_metrics(
    run: Run,
    *known: Mapping[str, float],
    groups: Groups = (),
    scores: Scores = (),
    advantages: Advantages = (),
) -> None:
    """One line of metrics for the step: what is known already, and the rollouts' own figures."""
    if not run.parallel.is_replica_head:
        return
    metrics = reduce(rollout_metrics(groups, scores, advantages), run.parallel.reducer())
    for each in known:
        metrics |= each
    seconds = run.stations.take()
    metrics |= {f"speed/seconds/{station}": value for station, value in seconds.items()}
    num_tokens = metrics.pop("rollout/num_tokens", 0.0)
    if num_tokens:
        metrics["speed/tokens_per_second"] = num_tokens / sum(seconds.values())
        metrics["rollout/tokens"] = num_tokens
    run.recorder.write(run.step, metrics)


def rollout_metrics(groups: Groups, scores: Scores, advantages: Advantages) -> dict[str, Metric]:
    """Reward, lengths, rates and policy versions of one replica's groups, to be reduced over the
    replicas.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    flat = [score for of_group in scores for score in of_group]
    lengths = [rollout.num_response_tokens for rollout in rollouts]
    has_signal = [len({score.reward for score in of_group}) > 1 for of_group in scores]
    return {
        "reward/mean": _mean([score.reward for score in flat]),
        "reward/format_rate/mean": _mean([score.is_formatted for score in flat]),
        "reward/failure_rate/mean": _mean([score.failure is not None for score in flat]),
        "reward/groups_with_signal/mean": _mean(has_signal),
        "advantage/abs/mean": _mean([abs(value) for each in advantages for value in each]),
        "rollout/response_tokens/mean": _mean(lengths),
        "rollout/response_tokens/max": Max(max(lengths, default=float("-inf"))),
        "rollout/truncation_rate/mean": _mean([is_truncated(each) for each in rollouts]),
        "rollout/num_tokens": Sum(float(sum(lengths))),
    }


def is_truncated(rollout: Rollout) -> bool:
    """Cut at max_tokens."""
    return rollout.finish_reason == "length"


def _mean(values: Sequence[float | bool]) -> Mean:
    return Mean(sum=float(sum(values)), count=len(values))


def save_hf_checkpoint(run: Run) -> None:
    """The final weights as a Hugging Face checkpoint in `<run_dir>/huggingface`; a collective."""
    if not run.config.checkpoint.save_hf:
        return
    tensors = run.learner.full_tensors()
    if run.parallel.rank == 0:
        write_checkpoint(run.run_dir / "huggingface", tensors, like=run.config.model.path)
    else:
        for _ in tensors:
            pass
    dist.barrier()
