"""Rollout groups in, a score for each rollout out.

Verifiers run in worker processes with a time limit for each response, since they run on text that a
model made up: a regular expression or a symbolic comparison may hang, and a hang or a crash must
neither stop the run nor pass for a wrong answer.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from megatron_rl.config import RewardConfig
from megatron_rl.errors import ConfigError
from megatron_rl.records import Prompt, Rollout, RolloutGroup, Score
from megatron_rl.reward.process import WorkerCrash, WorkerProcess, WorkerTimeout
from megatron_rl.reward.verifiers import check_verifier

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    score: Score
    error: str | None  # what went wrong, for the log


class Scorer:
    """A pool of scoring processes; a context manager, callable from any thread.

    The processes start in the background when it is made; the first score waits for them.

    Args:
        verifiers: source name -> verifier name (`reward.verifiers.resolve_verifiers`).

    Raises:
        ConfigError: an unknown verifier; from `score`, one that cannot be imported.
    """

    def __init__(self, config: RewardConfig, verifiers: Mapping[str, str]) -> None:
        for name in verifiers.values():
            check_verifier(name)
        self._config = config
        self._verifiers = dict(verifiers)
        self._lock = threading.Lock()
        self._workers: set[WorkerProcess] = set()
        self._is_closed = False
        # A thread owns one process for its life: the kernel ends the process with the thread.
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix="scorer")
        for _ in range(config.num_workers):
            self._threads.submit(self._worker)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; a score in progress fails. Closing twice is allowed."""
        with self._lock:
            self._is_closed = True
            workers = list(self._workers)
        # A signal, not WorkerProcess.kill: the owning thread reaps its process and closes its pipe.
        for worker in workers:
            worker.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in workers:
            worker.kill()

    def score(self, groups: Sequence[RolloutGroup]) -> list[tuple[Score, ...]]:
        """Scores every rollout of every group, in their order.

        A response that was cut at max_tokens gets `reward.truncated_reward` where that is set, is
        not formatted, and no verifier is asked.

        Raises:
            ConfigError: a source without a verifier, or a verifier that cannot be imported.
        """
        judged = self._judge_all(
            [
                (group.prompt, rollout.text)
                for group in groups
                for rollout in group.rollouts
                if not self._is_cut(rollout)
            ]
        )
        scores = iter(judged)
        cut = Score(reward=self._config.truncated_reward or 0.0, is_formatted=False, failure=None)
        return [
            tuple(cut if self._is_cut(rollout) else next(scores) for rollout in group.rollouts)
            for group in groups
        ]

    def score_texts(self, responses: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """Scores texts as if they were responses to the prompts beside them."""
        return self._judge_all(responses)

    def _is_cut(self, rollout: Rollout) -> bool:
        return self._config.truncated_reward is not None and rollout.is_truncated

    def _judge_all(self, responses: Sequence[tuple[Prompt, str]]) -> list[Score]:
        for prompt, _ in responses:
            if prompt.source not in self._verifiers:
                raise ConfigError(
                    f"data.tasks: expected a verifier for every source "
                    f"({', '.join(self._verifiers)}), got a prompt from {prompt.source!r}"
                )
        futures = [self._threads.submit(self._judge, *response) for response in responses]
        try:
            judged = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
        failed = [(prompt, one) for (prompt, _), one in zip(responses, judged) if one.score.failure]
        if failed:
            counts = Counter(one.score.failure for _, one in failed)
            prompt, first = failed[0]
            logger.warning(
                "reward: %d of %d responses could not be scored (%s); the first: prompt %d of %s, "
                "verifier %s: %s",
                len(failed),
                len(responses),
                ", ".join(f"{count} {kind}" for kind, count in counts.items()),
                prompt.index,
                prompt.source,
                self._verifiers[prompt.source],
                first.error,
            )
        return [one.score for one in judged]

    def _judge(self, prompt: Prompt, response: str) -> _Judged:
        question = {
            "verifier": self._verifiers[prompt.source],
            "response": response,
            "answer": prompt.answer,
            "metadata": prompt.metadata,
        }
        worker = self._worker()
        try:
            answer: dict[str, Any] = worker.request(question, self._config.timeout_seconds)
        except (WorkerTimeout, WorkerCrash) as failure:
            with self._lock:
                self._workers.discard(worker)
                is_closed = self._is_closed
            if is_closed:
                raise RuntimeError("the scorer was closed while it was scoring") from failure
            kind = "timeout" if isinstance(failure, WorkerTimeout) else "crash"
            failed = Score(reward=0.0, is_formatted=False, failure=kind)
            return _Judged(score=failed, error=str(failure))
        error = answer.pop("error")
        return _Judged(score=Score(**answer), error=error)

    def _worker(self) -> WorkerProcess:
        """This thread's process, ready; a new one where it is gone."""
        worker: WorkerProcess | None = getattr(self._own, "worker", None)
        if worker is None or not worker.is_alive():
            with self._lock:
                if self._is_closed:
                    raise RuntimeError("the scorer is closed")
                if worker is not None:
                    self._workers.discard(worker)
                worker = WorkerProcess(sorted(set(self._verifiers.values())))
                self._workers.add(worker)
            self._own.worker = worker
        worker.wait_until_ready()
        return worker


def rewards_of(scores: Sequence[Score]) -> tuple[float, ...]:
    """The rewards `[G]` of one group, for its advantages.

    A response that could not be scored gets the mean of the others' rewards, so that its advantage
    is 0: nothing is learnt from a verifier's failure. Where all failed, all get 0.
    """
    known = [score.reward for score in scores if score.failure is None]
    mean = math.fsum(known) / len(known) if known else 0.0
    return tuple(score.reward if score.failure is None else mean for score in scores)


def best_constant_answer(
    prompts: Sequence[Prompt],
    score_fn: Callable[[Sequence[tuple[Prompt, str]]], Sequence[Score]],
    max_candidates: int = 32,
) -> tuple[str, float]:
    """How often a policy would be right that always gave one and the same answer, at best.

    Shown beside avg@k, by the same rule (`Score.is_correct`): only what lies above it is skill. The
    candidates are the most frequent expected answers, ties in alphabetical order.

    Args:
        score_fn: scores (prompt, response) pairs, for instance `Scorer.score_texts`.
    Returns:
        the answer and the share of the prompts that it is right for; ("", 0.0) for no prompts.
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
