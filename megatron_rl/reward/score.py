"""Computes a score for each rollout of rollout groups.

Verifiers run in worker processes with a time limit for each response, because the text is generated
by a model: a regular expression or a symbolic comparison may hang. A hang or a crash must neither
stop the run nor count as a wrong answer.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_rl.config.data import RewardConfig, RewardTerm
from megatron_rl.errors import ConfigError
from megatron_rl.records import REWARD_ROUNDING, Prompt, Rollout, RolloutGroup, Score
from megatron_rl.reward.answers import without_unfinished_reasoning
from megatron_rl.reward.pool import WorkerPool
from megatron_rl.reward.registry import VERIFIER_KEY, check_group_verifier, check_verifier

logger = logging.getLogger(__name__)


FAILED = ("timeout", "crash")  # finish reasons of episodes whose environment failed


class Scorer:
    """Scores responses in worker processes; a context manager, callable from any thread.

    The processes start in the background when the scorer is created; the first score waits for
    them.

    Args:
        verifiers: source name -> its verifiers (`reward.registry.resolve_verifiers`), or the name
            of its only one.
        keys: verifier -> the setting that names it (`reward.registry.verifier_keys`), for messages.

    Raises:
        ConfigError: a verifier is unknown; raised by `score` if a verifier cannot be imported.
    """

    def __init__(
        self,
        config: RewardConfig,
        verifiers: Mapping[str, Sequence[RewardTerm] | str],
        keys: Mapping[str, str] | None = None,
    ) -> None:
        keys = keys or {}
        self.last_failure = ""  # what a verifier failed on, of the last call with a failure
        self._verifiers: dict[str, tuple[RewardTerm, ...]] = {}
        for source, terms in verifiers.items():
            if isinstance(terms, str):
                check_verifier(terms, keys.get(terms, VERIFIER_KEY))
                terms = (RewardTerm(verifier=terms),)
            for term in terms:
                check_verifier(term.verifier, keys.get(term.verifier, VERIFIER_KEY))
            self._verifiers[source] = tuple(terms)
        names = {term.verifier for terms in self._verifiers.values() for term in terms}
        if config.group_verifier:
            check_group_verifier(config.group_verifier)
        self._config = config
        self._pool = WorkerPool(config, {name: keys.get(name, VERIFIER_KEY) for name in names})

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a score in progress fails. May be called twice."""
        self._pool.close()

    def score(
        self, groups: Sequence[RolloutGroup], *, with_group_verifier: bool = False
    ) -> list[tuple[Score, ...]]:
        """Scores every rollout of every group, in their order.

        A response that was cut at max_tokens gets `reward.truncated_reward` if that is set, counts
        as not formatted, and is not shown to a verifier. Reasoning that did not end is not shown
        either, with `reward.skip_unfinished_reasoning`.

        Args:
            with_group_verifier: whether `reward.group_verifier`, if there is one, sets
                `Score.group_reward`. Training uses it, evaluation does not.

        Returns:
            For each group its scores, [G].

        Raises:
            ConfigError: a source has no verifier, or a verifier cannot be imported.
        """
        judged = self.score_texts(
            [
                (group.prompt, self._shown(group.prompt, rollout))
                for group in groups
                for rollout in group.rollouts
                if not is_unseen(rollout, self._config)
            ]
        )
        remaining = iter(judged)

        def unseen(rollout: Rollout) -> Score:
            return failed_score(rollout) if rollout.finish_reason in FAILED else cut

        cut = Score(reward=self._config.truncated_reward or 0.0, is_formatted=False, failure=None)
        scores = [
            tuple(
                unseen(rollout) if is_unseen(rollout, self._config) else next(remaining)
                for rollout in group.rollouts
            )
            for group in groups
        ]
        if with_group_verifier and self._config.group_verifier:
            return self._add_group_rewards(groups, scores)
        return scores

    def score_texts(self, responses: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """Score texts as if they were responses to the prompts that they are paired with.

        Raises:
            ConfigError: see `score`.
        """
        for prompt, _ in responses:
            if prompt.source not in self._verifiers:
                raise ConfigError(
                    f"data.tasks: expected a verifier for every source "
                    f"({', '.join(self._verifiers)}), got a prompt from {prompt.source!r}"
                )
        asked = [
            (prompt, response, term)
            for prompt, response in responses
            for term in self._verifiers[prompt.source]
        ]
        answers = self._pool.ask(
            [
                {
                    "verifier": term.verifier,
                    "response": response,
                    "answer": prompt.answer,
                    "metadata": prompt.metadata,
                }
                for prompt, response, term in asked
            ]
        )
        judged_by = [
            (number, prompt, term.verifier)
            for number, (prompt, _) in enumerate(responses)
            for term in self._verifiers[prompt.source]
        ]
        self._log_failures(answers, "responses", judged_by)
        remaining = iter(answers)
        return [
            _sum([(term, next(remaining)) for term in self._verifiers[prompt.source]])
            for prompt, _ in responses
        ]

    def rejections(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """For each prompt, why its verifier, or the first one of several, does not accept the
        expected answer as a response; None if it does.

        Raises:
            ConfigError: see `score`.
        """
        answers = self._pool.ask(
            [
                {
                    "verifier": self._verifiers[prompt.source][0].verifier,
                    "response": prompt.answer,
                    "answer": prompt.answer,
                    "metadata": prompt.metadata,
                }
                for prompt in prompts
            ]
        )
        return [_rejection(answer) for answer in answers]

    def crashes(self, prompts: Sequence[Prompt], verifier: str) -> list[str | None]:
        """For each prompt, the error with which a verifier fails on the expected answer as a
        response, or `reward.group_verifier` on a group of two such responses; None if it returns
        what it should, or takes too long.

        Raises:
            ConfigError: see `score`.
        """
        score = Score(reward=1.0, is_formatted=True, failure=None)

        def question(prompt: Prompt) -> dict[str, Any]:
            asked = {"answer": prompt.answer, "metadata": prompt.metadata}
            if verifier != self._config.group_verifier:
                return asked | {"verifier": verifier, "response": prompt.answer}
            return asked | {
                "responses": [prompt.answer] * 2,
                "scores": [asdict(score)] * 2,
                "num_tokens": [1, 1],
            }

        answers = self._pool.ask([question(prompt) for prompt in prompts])
        return [
            answer["error"] if answer.get("failure") == "crash" and "error" in answer else None
            for answer in answers
        ]

    def _shown(self, prompt: Prompt, rollout: Rollout) -> str:
        if self._config.skip_unfinished_reasoning:
            return without_unfinished_reasoning(rollout.text, prompt.text)
        return rollout.text

    def _add_group_rewards(
        self, groups: Sequence[RolloutGroup], scores: Sequence[tuple[Score, ...]]
    ) -> list[tuple[Score, ...]]:
        """The scores with the group verifier's rewards. The group reward is 0 if the group verifier
        fails on the group, or if the response could not be scored.
        """
        answers = self._pool.ask(
            [
                {
                    "answer": group.prompt.answer,
                    "metadata": group.prompt.metadata,
                    "responses": [rollout.text for rollout in group.rollouts],
                    "scores": [asdict(score) for score in of_group],
                    "num_tokens": [rollout.num_response_tokens for rollout in group.rollouts],
                }
                for group, of_group in zip(groups, scores, strict=True)
            ]
        )
        name = self._config.group_verifier
        judged_by = [(number, group.prompt, name) for number, group in enumerate(groups)]
        self._log_failures(answers, "groups", judged_by)
        return [
            of_group
            if "failure" in answer
            else tuple(
                score if score.failure else replace(score, group_reward=reward)
                for score, reward in zip(of_group, answer["group_rewards"], strict=True)
            )
            for of_group, answer in zip(scores, answers, strict=True)
        ]

    def _log_failures(
        self,
        answers: Sequence[dict[str, Any]],
        what: str,
        judged_by: Sequence[tuple[int, Prompt, str]],
    ) -> None:
        """Log a warning about the failures among the workers' answers, quoting the first one in
        full.

        Args:
            what: the judged objects, in the plural.
            judged_by: for each answer, the number of the judged object, from 0, its prompt, and the
                name of the verifier.
        """
        failed = [
            (*each, answer) for each, answer in zip(judged_by, answers) if answer.get("failure")
        ]
        if not failed:
            return
        _, prompt, verifier, first = failed[0]
        self.last_failure = (
            f"prompt {prompt.index} of {prompt.source}, verifier {verifier}: {first.get('error')}"
        )
        # An object counts once, by the first of its verifiers that failed.
        kinds = {number: answer["failure"] for number, *_, answer in reversed(failed)}
        logger.warning(
            "reward: %d of %d %s could not be scored (%s); the first: %s",
            len(kinds),
            judged_by[-1][0] + 1,
            what,
            ", ".join(f"{count} {kind}" for kind, count in Counter(kinds.values()).items()),
            self.last_failure,
        )


def _sum(answers: Sequence[tuple[RewardTerm, dict[str, Any]]]) -> Score:
    """The score of a response from its verifiers' answers. If one of them failed, the response
    could not be scored.
    """
    failures = [answer["failure"] for _, answer in answers if answer["failure"] is not None]
    if failures:
        return Score(reward=0.0, is_formatted=False, failure=failures[0])
    is_one_reward = len(answers) == 1 and answers[0][0].weight == 1
    rewards = tuple((term.verifier, answer["reward"]) for term, answer in answers)
    return Score(
        reward=math.fsum(term.weight * answer["reward"] for term, answer in answers),
        is_formatted=answers[0][1]["is_formatted"],
        failure=None,
        verifier_rewards=() if is_one_reward else rewards,
    )


def _rejection(answer: dict[str, Any]) -> str | None:
    if answer["failure"] is not None:
        return answer.get("error", answer["failure"])
    is_accepted = answer["reward"] >= 1.0 - REWARD_ROUNDING
    return None if is_accepted else f"reward {answer['reward']:g}"


def failed_score(rollout: Rollout) -> Score:
    """The score of an episode that its environment did not end: as of a verifier that failed."""
    return Score(reward=0.0, is_formatted=False, failure=rollout.finish_reason)


def is_unseen(rollout: Rollout, config: RewardConfig) -> bool:
    """Whether a response is not shown to a verifier: it is given `reward.truncated_reward`, or its
    environment failed.
    """
    if rollout.finish_reason in FAILED:
        return True
    return config.truncated_reward is not None and rollout.is_truncated


def rewards_of(scores: Sequence[Score]) -> tuple[float | None, ...]:
    """The rewards [G] of one group, for its advantages: each is the response's own reward plus the
    group verifier's reward, or None if the response could not be scored.
    """
    return tuple(
        None if score.failure is not None else score.reward + score.group_reward for score in scores
    )


def best_constant_answer(
    prompts: Sequence[Prompt],
    score_fn: Callable[[Sequence[tuple[Prompt, str]]], Sequence[Score]],
    max_candidates: int = 32,
) -> tuple[str, float]:
    """The best accuracy of a policy that gives the same answer to every prompt.

    It is reported next to avg@k as a baseline and uses the same rule (`Score.is_correct`). The
    candidates are the most frequent expected answers, with ties in alphabetical order.

    Args:
        score_fn: scores (prompt, response) pairs, for instance `Scorer.score_texts`.
        max_candidates: number of answers to try.

    Returns:
        The answer and the share of prompts for which it is correct; ("", 0.0) without prompts.
    """
    counts = Counter(prompt.answer for prompt in prompts)
    candidates = sorted(counts, key=lambda answer: (-counts[answer], answer))[:max_candidates]
    best = ("", 0.0)
    for answer in candidates:
        scores = score_fn([(prompt, answer) for prompt in prompts])
        share = sum(score.is_correct for score in scores) / len(prompts)
        if share > best[1] or best == ("", 0.0):
            best = (answer, share)
    return best
