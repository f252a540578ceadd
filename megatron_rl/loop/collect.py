"""The first phases of a step: prompts, rollouts, rewards and advantages. They run on the head of
each replica, for that replica's share of the prompts.

With dynamic sampling (DAPO, arXiv 2503.14476), a group without signal, that is, one whose kept
responses all have the same score from the verifier (`has_signal`), is dropped, and another prompt
is sampled in its place. Rounds of sampling continue until `loop.prompts_per_step` groups are kept
or `loop.dynamic_sampling.max_rounds` is reached; in the second case the step learns from fewer
groups.
The prompts of a round depend only on the total number of groups that all replicas kept, never on
which replica kept them. Dropped groups still count towards the mean discrepancy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_rl.config import Config, ObjectiveConfig, RewardConfig
from megatron_rl.errors import RewardError
from megatron_rl.loop.replicas import Replicas
from megatron_rl.loop.restore import Restore, ask_engines, no_engines_to_restore
from megatron_rl.loop.state import LoopState
from megatron_rl.objective.advantage import group_advantages, reward_deviations
from megatron_rl.observe.metrics import Metric, merge
from megatron_rl.observe.stopwatch import Phase
from megatron_rl.records import JudgedGroup, SampledStep, Score, ScoredGroup
from megatron_rl.reward.overlong import overlong_penalty
from megatron_rl.reward.score import is_unseen, rewards_of
from megatron_rl.rollout.source import RolloutRequest, RolloutSource, TakenRollouts


class _Counts(NamedTuple):
    """Numbers of rounds, over all replicas."""

    num_prompts: int = 0
    num_rounds: int = 0
    num_kept: int = 0  # groups with a kept response
    num_responses: int = 0
    num_scored: int = 0  # responses

    def plus(self, other: _Counts) -> _Counts:
        """The sums."""
        return _Counts(*map(sum, zip(self, other, strict=True)))


def collect_step(
    source: RolloutSource | None,
    replicas: Replicas,
    state: LoopState,
    config: Config,
    phase: Phase,
    restore: Restore = no_engines_to_restore,
    failure: Callable[[], str] = lambda: "",
) -> SampledStep:
    """The rollouts of `state.step` with their rewards and advantages. A collective over all ranks.

    The caller advances `state.next_prompt` by the `num_prompts` of the result.

    Args:
        source: provides the rollouts; None on ranks that are not the head of a replica.
        restore: see `loop/restore.py`.
        failure: what a verifier failed on last.

    Raises:
        RewardError: of all replicas' responses none could be scored; on the heads of replicas.
    """
    loop, dynamic = config.loop, config.loop.dynamic_sampling
    groups: list[JudgedGroup] = []
    metrics: dict[str, Metric] = {}
    total = _Counts()
    while total.num_kept < loop.prompts_per_step and total.num_rounds < dynamic.max_rounds:
        request = RolloutRequest(
            step=state.step,
            first_prompt=state.next_prompt + total.num_prompts,
            num_prompts=loop.prompts_per_step - total.num_kept,
            weight_version=state.published_version,
        )
        taken = _take(source, request, restore)
        of_round, of_source, counts, is_whole_step = _judge(taken, replicas, config, phase)
        groups += of_round
        metrics = merge([metrics, of_source])
        total = total.plus(counts)
        if is_whole_step or not dynamic.enabled:
            break
    # Only the heads know a cause, and the first rank that fails reports.
    if total.num_responses and not total.num_scored and replicas.is_replica_head:
        cause = failure()
        raise RewardError(
            f"reward: expected scores for step {state.step}, got none: none of its "
            f"{total.num_responses} responses could be scored{f'; {cause}' if cause else ''}"
        )
    return SampledStep(
        groups=tuple(groups),
        num_prompts=total.num_prompts,
        num_rounds=total.num_rounds,
        metrics=metrics,
    )


def _take(
    source: RolloutSource | None, request: RolloutRequest, restore: Restore
) -> TakenRollouts | None:
    """This replica's rollouts of one round; None on a rank without a source."""
    taken = None

    def take() -> TakenRollouts | None:
        nonlocal taken
        if source is not None and taken is None:  # another replica may have to ask again
            taken = source.take(request)
        return taken

    return ask_engines(take, restore, nullcontext)


def _judge(
    taken: TakenRollouts | None, replicas: Replicas, config: Config, phase: Phase
) -> tuple[list[JudgedGroup], Mapping[str, Metric], _Counts, bool]:
    """This replica's groups of one round and its source's metrics; and, on every rank, the round's
    numbers and whether these are all groups of the step.

    Every round ends with a collective, so that no rank waits in one for longer than a round takes.
    """
    groups: list[JudgedGroup] = []
    metrics: Mapping[str, Metric] = {}
    counts, is_whole_step = _Counts(), False
    if taken is not None:
        groups = [judge(scored, config) for scored in taken.groups]
        num_kept = sum(any(each.is_kept) for each in groups)
        failures = [score.failure for each in groups for score in each.scores]
        own = torch.tensor([num_kept, len(failures), failures.count(None)], dtype=torch.float64)
        is_whole_step, metrics = taken.is_whole_step, taken.metrics
    with phase("rollout"):  # the seconds in which a replica waits for the slowest one
        if taken is not None:
            of_all = map(int, replicas.reducer()(own, "sum").tolist())
            counts = _Counts(taken.num_prompts, taken.num_rounds, *of_all)
        counts, is_whole_step = replicas.from_replica_head((counts, is_whole_step))
    return groups, metrics, counts, is_whole_step


def judge(scored: ScoredGroup, config: Config) -> JudgedGroup:
    """Compute a group's over-long penalties and advantages, and decide which responses are kept.

    Every response is kept, with three exceptions: a response that the verifier could not score,
    which takes no part in its group's advantages either; truncated responses if
    `reward.overlong.mask_truncated` is set; and all responses of a group without signal under
    dynamic sampling.
    """
    overlong, max_tokens = config.reward.overlong, config.rollout.sampling.max_tokens
    rollouts, scores = scored.group.rollouts, scored.scores
    penalties = tuple(
        overlong_penalty(
            rollout.num_response_tokens,
            max_tokens=max_tokens,
            buffer_tokens=overlong.buffer_tokens,
            penalty=overlong.penalty,
        )
        if score.failure is None
        else 0.0
        for rollout, score in zip(rollouts, scores, strict=True)
    )
    shaped = [
        replace(score, reward=score.reward + penalty)
        for score, penalty in zip(scores, penalties, strict=True)
    ]
    is_kept = tuple(
        score.failure is None and not (overlong.mask_truncated and rollout.is_truncated)
        for rollout, score in zip(rollouts, scores, strict=True)
    )
    signal = has_signal(scored, is_kept, config.reward)
    if config.loop.dynamic_sampling.enabled and not signal:
        is_kept = (False,) * len(rollouts)
    return JudgedGroup(
        group=scored.group,
        scores=scores,
        overlong_penalties=penalties,
        advantages=advantages_of(config.objective, shaped),
        is_kept=is_kept,
        has_signal=signal,
    )


def advantages_of(objective: ObjectiveConfig, scores: Sequence[Score]) -> tuple[float, ...]:
    """[G] the advantages of one group, relative to each other: mean and standard deviation are
    those of the responses that could be scored, and the advantage of any other response is 0.
    """
    rewards = rewards_of(scores)
    advantages = group_advantages(
        torch.tensor([each for each in rewards if each is not None], dtype=torch.float64),
        epsilon=objective.advantage_epsilon,
        deviation=objective.advantage_std,
    )
    known = iter(advantages.tolist())
    return tuple(0.0 if each is None else next(known) for each in rewards)


def has_signal(scored: ScoredGroup, is_kept: Sequence[bool], config: RewardConfig) -> bool:
    """Whether the verifier's own scores tell a kept response from its group: whether one differs
    from the mean of the group by more than rounding. Over-long penalties and rewards of a group
    verifier do not count.

    DAPO (arXiv 2503.14476, equation 11) judges a group by the number of correct responses. A
    response that was cut before a verifier saw it therefore counts as wrong, whatever
    `reward.truncated_reward` is: its score is 0, or the lowest of its group if that is lower.
    """
    known = [
        (score.reward, is_unseen(rollout, config), kept)
        for rollout, score, kept in zip(scored.group.rollouts, scored.scores, is_kept, strict=True)
        if score.failure is None
    ]
    wrong = min([0.0, *(reward for reward, unseen, _ in known if not unseen)])
    rewards = [wrong if unseen else reward for reward, unseen, _ in known]
    deviations = reward_deviations(torch.tensor(rewards, dtype=torch.float64)).tolist()
    return any(kept and each != 0 for each, (_, _, kept) in zip(deviations, known, strict=True))
