"""Threads that each own a worker process, which is replaced when it has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from megatron_rl.process.worker_process import WorkerProcess


class WorkerThreads:
    """`threads` is an executor, in whose threads `worker()` is called.

    Args:
        start: a new process.
        closed: the error of a call after `close`.
        name: of the threads.
    """

    def __init__(
        self,
        num_workers: int,
        start: Callable[[], WorkerProcess],
        closed: Callable[[], Exception],
        *,
        name: str,
    ) -> None:
        self._start, self._closed = start, closed
        self._lock = threading.Lock()
        self._workers: set[WorkerProcess] = set()
        self._is_closed = False
        # A process belongs to one thread for life: the kernel ends the process with the thread.
        self._own = threading.local()
        self.threads = ThreadPoolExecutor(num_workers, thread_name_prefix=name)

    def worker(self) -> WorkerProcess:
        """This thread's process, ready for a question; a new one if the last one ended."""
        worker: WorkerProcess | None = getattr(self._own, "worker", None)
        if worker is None or not worker.is_alive():
            with self._lock:
                if self._is_closed:
                    raise self._closed()
                if worker is not None:
                    self._workers.discard(worker)
                worker = self._start()
                self._workers.add(worker)
            self._own.worker = worker
        worker.wait_until_ready()
        return worker

    def discard(self, worker: WorkerProcess) -> bool:
        """Forget a process that failed; whether the pool is closed."""
        with self._lock:
            self._workers.discard(worker)
            return self._is_closed

    def close(self) -> None:
        """End the processes; questions in progress fail. May be called twice."""
        with self._lock:
            self._is_closed = True
            workers = list(self._workers)
        # A signal, not WorkerProcess.kill: the owning thread reaps its process and closes its pipe.
        for worker in workers:
            worker.interrupt()
        self.threads.shutdown(wait=True, cancel_futures=True)
        for worker in workers:
            worker.kill()
