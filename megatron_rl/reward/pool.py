"""A pool of scoring processes, which answer questions in parallel.

Each process belongs to a thread of the pool. The thread sends it one question at a time and
replaces it after a timeout or a crash. `reward/worker.py` describes questions and answers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_rl.config import RewardConfig
from megatron_rl.process.worker_process import WorkerCrash, WorkerProcess, WorkerTimeout


class WorkerPool:
    """`reward.num_workers` scoring processes; callable from any thread.

    The processes start in the background when the pool is created; the first question waits for
    them.

    Args:
        config: the number of processes, the time limit and the group verifier.
        verifiers: names of the verifiers of single responses that the processes import.
    """

    def __init__(self, config: RewardConfig, verifiers: Sequence[str]) -> None:
        self._config = config
        self._verifiers = verifiers
        self._lock = threading.Lock()
        self._workers: set[WorkerProcess] = set()
        self._is_closed = False
        # A process belongs to one thread for life: the kernel ends the process with the thread.
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix="scorer")
        for _ in range(config.num_workers):
            self._threads.submit(self._worker)

    def ask(self, questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers, in the order of the questions.

        If a process does not answer in time, or ends, the answer is {"failure": "timeout" or
        "crash", "error": description}.

        Raises:
            ConfigError: a verifier cannot be loaded.
            RuntimeError: the pool is closed, or was closed in the meantime.
        """
        futures = [self._threads.submit(self._ask, question) for question in questions]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """End the processes; questions in progress fail. May be called twice."""
        with self._lock:
            self._is_closed = True
            workers = list(self._workers)
        # A signal, not WorkerProcess.kill: the owning thread reaps its process and closes its pipe.
        for worker in workers:
            worker.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in workers:
            worker.kill()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        worker = self._worker()
        try:
            return worker.request(question, self._config.timeout_seconds)
        except (WorkerTimeout, WorkerCrash) as failure:
            with self._lock:
                self._workers.discard(worker)
                is_closed = self._is_closed
            if is_closed:
                raise RuntimeError("the scorer was closed while it was scoring") from failure
            kind = "timeout" if isinstance(failure, WorkerTimeout) else "crash"
            return {"failure": kind, "error": str(failure)}

    def _worker(self) -> WorkerProcess:
        """This thread's process, ready for a question; a new one if the last one ended."""
        worker: WorkerProcess | None = getattr(self._own, "worker", None)
        if worker is None or not worker.is_alive():
            with self._lock:
                if self._is_closed:
                    raise RuntimeError("the scorer is closed")
                if worker is not None:
                    self._workers.discard(worker)
                worker = WorkerProcess(
                    "megatron_rl.reward.worker",
                    (self._config.group_verifier, *self._verifiers),
                    what="scoring process",
                    key="data.tasks[].verifier",
                )
                self._workers.add(worker)
            self._own.worker = worker
        worker.wait_until_ready()
        return worker
