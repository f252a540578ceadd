"""Runs the tool of an environment in processes of its own, with a time limit for every call: a tool
that hangs or ends its process costs one episode.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_rl.config.rollout import EnvironmentConfig
from megatron_rl.process.worker_process import WorkerCrash, WorkerProcess, WorkerTimeout
from megatron_rl.process.worker_threads import WorkerThreads
from megatron_rl.records import Prompt
from megatron_rl.rollout.multi_turn import ToolCrash, ToolTimeout

WORKER = "megatron_rl.rollout.tool_worker"


class ToolPool:
    """`rollout.environment.num_workers` processes; a context manager that ends them. They start
    with the first calls. Callable from any event loop.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        self._config = config
        self._pool = WorkerThreads(
            config.num_workers,
            self._start,
            lambda: ToolCrash("the run is ending"),
            name="tool",
        )

    def __enter__(self) -> ToolPool:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; calls in progress fail. May be called twice."""
        self._pool.close()

    async def reply(self, prompt: Prompt, turns: Sequence[str]) -> str | None:
        """The tool's answer to the last turn; None: it has nothing to say.

        Raises:
            ToolTimeout: none within `rollout.environment.tool_seconds`.
            ToolCrash: the tool raised an error, or its process ended.
        """
        question = {"prompt": asdict(prompt), "turns": list(turns)}
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._pool.threads, self._ask, question)
        if answer.get("error") is not None:
            raise ToolCrash(answer["error"])
        return answer["reply"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        worker = self._pool.worker()
        try:
            return worker.request(question, self._config.tool_seconds)
        except WorkerTimeout as failure:
            raise ToolTimeout(str(failure)) from failure
        except WorkerCrash as failure:
            raise ToolCrash(str(failure)) from failure

    def _start(self) -> WorkerProcess:
        return WorkerProcess(
            WORKER, [self._config.name], what="tool", key="rollout.environment.name"
        )
