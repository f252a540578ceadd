"""A pool of scoring processes, which answer questions in parallel.

Each process belongs to a thread of the pool. The thread sends it one question at a time and
replaces it after a timeout or a crash. `reward/worker.py` describes questions and answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.config.data import RewardConfig
from megatron_rl.process.worker_process import (
    WorkerCrash,
    WorkerKilled,
    WorkerProcess,
    WorkerTimeout,
)
from megatron_rl.process.worker_threads import WorkerThreads


class WorkerPool:
    """`reward.num_workers` scoring processes; callable from any thread.

    The processes start in the background when the pool is created; the first question waits for
    them.

    Args:
        config: the number of processes, the time limit and the group verifier.
        verifiers: names of the verifiers of single responses that the processes import, each with
            the setting that names it.
    """

    def __init__(self, config: RewardConfig, verifiers: Mapping[str, str]) -> None:
        self._config = config
        self._verifiers = verifiers
        self._pool = WorkerThreads(
            config.num_workers,
            self._start,
            lambda: RuntimeError("the scorer is closed"),
            name="scorer",
        )
        for _ in range(config.num_workers):
            self._pool.threads.submit(self._pool.worker)

    def ask(self, questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers, in the order of the questions.

        If a process does not answer in time, or ends, the answer is {"failure": "timeout" or
        "crash", "error": description}. A question whose process was killed is asked once more, in
        what is left of its time: the kernel or an operator may have killed it for no fault of the
        response, which would otherwise drop out of its group.

        Raises:
            ConfigError: a verifier cannot be loaded.
            RuntimeError: the pool is closed, or was closed in the meantime.
        """
        futures = [self._pool.threads.submit(self._ask, question) for question in questions]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """End the processes; questions in progress fail. May be called twice."""
        self._pool.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        seconds, is_again = self._config.timeout_seconds, False
        while True:
            worker = self._pool.worker()
            begin = time.monotonic()
            try:
                return worker.request(question, seconds)
            except (WorkerTimeout, WorkerCrash) as failure:
                if self._pool.discard(worker):
                    raise RuntimeError("the scorer was closed while it was scoring") from failure
                seconds -= time.monotonic() - begin
                if isinstance(failure, WorkerKilled) and not is_again and seconds > 0:
                    is_again = True
                    continue
                kind = "timeout" if isinstance(failure, WorkerTimeout) else "crash"
                return {"failure": kind, "error": str(failure)}

    def _start(self) -> WorkerProcess:
        return WorkerProcess(
            "megatron_rl.reward.worker",
            (
                str(self._config.memory_gib),
                self._config.group_verifier,
                *(f"{name}={key}" for name, key in sorted(self._verifiers.items())),
            ),
            what="scoring process",
            key=min(self._verifiers.values(), default="reward"),
        )
