"""The first stations of train.py: prompts in, a step's scored rollouts with their advantages out,
on the heads of the replicas, each its own prompts; or the recorded ones of a replay.

With dynamic sampling (DAPO, arXiv 2503.14476) a group without signal, whose kept responses all have
an advantage of 0, is dropped, and as many further prompts are sampled, round after round, until
`loop.prompts_per_step` groups are kept or `loop.dynamic_sampling.max_rounds` is reached; then the
step learns from fewer. Which prompts a round takes depends on how many groups of all replicas were
kept, never on which replica had them. What was dropped still counts for the mean discrepancy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_rl.config import Config
from megatron_rl.engine.client import sampling_seed
from megatron_rl.errors import DataError
from megatron_rl.loop.report import NOTHING_SAMPLED, Groups, Scores
from megatron_rl.loop.run import Run
from megatron_rl.loop.stations import advantages_of, check_versions
from megatron_rl.records import SampledStep
from megatron_rl.reward.overlong import overlong_penalty
from megatron_rl.rollout.recording import read_step


def sample_step(run: Run) -> SampledStep:
    """The rollouts of a step, scored; a collective. The prompts it took are for the caller to count
    (`Run.next_prompt`).
    """
    return _recorded_step(run) if run.is_replay else _sample_rounds(run)


def _sample_rounds(run: Run) -> SampledStep:
    loop, dynamic = run.config.loop, run.config.loop.dynamic_sampling
    rounds: list[SampledStep] = []
    num_kept = num_prompts = 0
    while num_kept < loop.prompts_per_step and len(rounds) < dynamic.max_rounds:
        missing = loop.prompts_per_step - num_kept
        rounds.append(_sample_round(run, run.next_prompt + num_prompts, missing))
        num_prompts += missing
        if not dynamic.enabled:
            break
        num_kept += _count_kept(run, rounds[-1])
    return SampledStep(
        groups=[group for each in rounds for group in each.groups],
        scores=[scores for each in rounds for scores in each.scores],
        penalties=[values for each in rounds for values in each.penalties],
        advantages=[values for each in rounds for values in each.advantages],
        is_kept=[values for each in rounds for values in each.is_kept],
        num_prompts=num_prompts,
        num_rounds=len(rounds),
    )


def _sample_round(run: Run, first_prompt: int, num_prompts: int) -> SampledStep:
    """This replica's share of so many prompts."""
    if not run.parallel.is_replica_head:
        return NOTHING_SAMPLED
    start, count = run.share(num_prompts)
    prompts = run.stream.prompts(first_prompt + start, count)
    seeds = [sampling_seed(run.config.loop.seed, run.step, prompt.index) for prompt in prompts]
    with run.stations.time("rollout"):
        groups = run.client.generate(
            prompts,
            run.config.rollout.sampling,
            num_samples=run.config.loop.samples_per_prompt,
            seeds=seeds,
        )
    check_versions(groups, run.published_version)
    with run.stations.time("reward"):
        scores = run.scorer.score(groups, with_group_verifier=True)
    return judge(run.config, groups, scores, num_prompts=num_prompts, num_rounds=1)


def _count_kept(run: Run, sampled: SampledStep) -> int:
    """Groups of all replicas with anything to learn from; on every rank, each round, so that no
    rank waits in a collective for longer than a round takes.
    """
    count = 0
    if run.parallel.is_replica_head:
        own = torch.tensor([sum(map(any, sampled.is_kept))], dtype=torch.float64)
        count = int(run.parallel.reducer()(own, "sum"))
    return run.parallel.from_replica_head(count)


def _recorded_step(run: Run) -> SampledStep:
    sampled = None
    if run.parallel.is_replica_head:
        groups, scores = read_step(run.replay_dir, run.step)
        _check_recorded(run, groups)
        start, count = run.share(len(groups))
        own = slice(start, start + count)
        sampled = judge(run.config, groups[own], scores[own], num_prompts=len(groups), num_rounds=0)
    num_prompts = run.parallel.from_replica_head(sampled.num_prompts if sampled else 0)
    return sampled or replace(NOTHING_SAMPLED, num_prompts=num_prompts)


def _check_recorded(run: Run, groups: Groups) -> None:
    loop = run.config.loop
    indices = [group.prompt.index for group in groups]
    is_dynamic = loop.dynamic_sampling.enabled
    is_right = (
        indices == list(range(run.next_prompt, run.next_prompt + len(groups)))
        and all(len(group.rollouts) == loop.samples_per_prompt for group in groups)
        and len(groups) >= loop.prompts_per_step
        and (is_dynamic or len(groups) == loop.prompts_per_step)
    )
    if not is_right:
        raise DataError(
            f"replay={run.replay_dir}: expected step {run.step} to hold {loop.prompts_per_step} "
            f"prompts {'or more ' if is_dynamic else ''}from prompt {run.next_prompt} on with "
            f"{loop.samples_per_prompt} samples each (loop.prompts_per_step, "
            "loop.samples_per_prompt, loop.dynamic_sampling), got "
            f"{len(groups)} from prompt {indices[0] if indices else 'none'} on with "
            f"{len(groups[0].rollouts) if groups else 0}"
        )


def judge(
    config: Config, groups: Groups, scores: Scores, *, num_prompts: int, num_rounds: int
) -> SampledStep:
    """Penalties, advantages, and what is kept: everything, but for cut responses where
    `reward.overlong.mask_truncated` says so, and groups without signal under dynamic sampling.
    """
    overlong, max_tokens = config.reward.overlong, config.rollout.sampling.max_tokens
    penalties = [
        [
            overlong_penalty(
                rollout.num_response_tokens,
                max_tokens=max_tokens,
                buffer_tokens=overlong.buffer_tokens,
                penalty=overlong.penalty,
            )
            for rollout in group.rollouts
        ]
        for group in groups
    ]
    shaped = [
        [
            replace(score, reward=score.reward + penalty)
            for score, penalty in zip(of_group, of_penalties, strict=True)
        ]
        for of_group, of_penalties in zip(scores, penalties, strict=True)
    ]
    advantages = advantages_of(config.objective, shaped)
    is_kept = [
        [not (overlong.mask_truncated and each.is_truncated) for each in group.rollouts]
        for group in groups
    ]
    if config.loop.dynamic_sampling.enabled:
        is_kept = [
            [is_own and has_signal(of_group, kept) for is_own in kept]
            for of_group, kept in zip(advantages, is_kept, strict=True)
        ]
    return SampledStep(
        groups=groups,
        scores=scores,
        penalties=penalties,
        advantages=advantages,
        is_kept=is_kept,
        num_prompts=num_prompts,
        num_rounds=num_rounds,
    )


def has_signal(advantages: Sequence[float], is_kept: Sequence[bool]) -> bool:
    """Whether a kept response of the group has an advantage other than 0."""
    return any(advantage != 0 for advantage, kept in zip(advantages, is_kept, strict=True) if kept)
