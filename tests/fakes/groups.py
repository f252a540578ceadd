"""Groups of rollouts with their scores, made by hand."""

from __future__ import annotations

from megatron_rl.records import JudgedGroup, Prompt, Rollout, RolloutGroup, Score, ScoredGroup

PROMPT_IDS = (1, 5)


def make_prompt(index: int, *, source: str = "task") -> Prompt:
    """The prompt "1+1=" of two tokens."""
    return Prompt(index=index, source=source, text="1+1=", token_ids=PROMPT_IDS, answer="2")


def make_rollout(
    num_tokens: int = 1,
    *,
    finish_reason: str = "stop",
    logprob: float = -0.5,
    version: int = 0,
    engine: str = "",
) -> Rollout:
    """A response of so many tokens, all with the same log-prob."""
    num_prompt = len(PROMPT_IDS)
    return Rollout(
        token_ids=(*PROMPT_IDS, *[6] * num_tokens),
        loss_mask=(False,) * num_prompt + (True,) * num_tokens,
        rollout_logprobs=(0.0,) * num_prompt + (logprob,) * num_tokens,
        weight_versions=(-1,) * num_prompt + (version,) * num_tokens,
        finish_reason=finish_reason,
        text="2",
        engine=engine,
    )


def make_group(index: int, *rollouts: Rollout, source: str = "task") -> RolloutGroup:
    """The rollouts of one prompt."""
    return RolloutGroup(prompt=make_prompt(index, source=source), rollouts=rollouts)


def make_scores(*rewards: float | None) -> tuple[Score, ...]:
    """Scores of these rewards; None: the verifier ran out of time."""
    return tuple(
        Score(
            reward=reward or 0.0,
            is_formatted=bool(reward),
            failure="timeout" if reward is None else None,
        )
        for reward in rewards
    )


def scored(index: int, *rewards: float | None, source: str = "task") -> ScoredGroup:
    """A group with one short rollout for every reward."""
    rollouts = [make_rollout() for _ in rewards]
    group = make_group(index, *rollouts, source=source)
    return ScoredGroup(group=group, scores=make_scores(*rewards))


def judged(scored_group: ScoredGroup, *advantages: float, has_signal: bool = False) -> JudgedGroup:
    """The group with these advantages, all of it kept."""
    size = len(scored_group.scores)
    return JudgedGroup(
        group=scored_group.group,
        scores=scored_group.scores,
        overlong_penalties=(0.0,) * size,
        advantages=advantages or (0.0,) * size,
        is_kept=(True,) * size,
        has_signal=has_signal,
    )
