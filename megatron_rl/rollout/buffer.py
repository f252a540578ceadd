"""The source that samples ahead: it keeps prompts in flight on the engines while the learner trains
(`rollout.max_policy_age` above 0).

A thread of this process runs an event loop. It starts prompts as long as the shelf has room for
them (rollout/shelf.py), has each group scored as soon as it is sampled, and puts it on the shelf.
`take` waits for the groups of its step and hands them out. Which step used which prompts is in the
run's recorded rollouts.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np

from megatron_rl.engine.requests import EnginePool, Sampler
from megatron_rl.errors import EngineError, EnginesLostError
from megatron_rl.observe.metrics import Max, Mean, Metric, Sum, mean_of
from megatron_rl.records import Prompt, RolloutGroup, Score, ScoredGroup
from megatron_rl.rollout.idle import IdleClock
from megatron_rl.rollout.shelf import Shelf, oldest_version
from megatron_rl.rollout.source import RolloutRequest, TakenRollouts

TICK_SECONDS = 0.05  # at most so long after the shelf gained room, prompts are started
TELL_SECONDS = 60.0  # between lines that say what a step waits for

logger = logging.getLogger(__name__)


class BufferedSource:
    """A `RolloutSource`, and a context manager that ends the sampling. The first `take` starts it;
    until then the engines may serve weights that are not the learner's.

    Args:
        prompts: returns the prompts for a first index and a number; called from the thread.
        sample: samples the group of a prompt, given the version of the weights that the engines
            serve when it starts.
        score: returns the scores of the rollouts of groups; called from several threads.
        indices: the prompts of this replica, in the order in which they are started.
        kept: groups that a checkpoint kept, by prompt; they are not sampled again.
        share: given the number of items of all replicas together, returns the index of this
            replica's first item and the number of its items.
        version: of the weights that every engine serves; called from the thread.
        time: returns a context manager that times the named phase.
    """

    def __init__(
        self,
        prompts: Callable[[int, int], Sequence[Prompt]],
        sample: Callable[[Prompt, int, Sampler], Awaitable[RolloutGroup]],
        pool: EnginePool,
        score: Callable[[Sequence[RolloutGroup]], Sequence[tuple[Score, ...]]],
        *,
        shelf: Shelf,
        max_age: int,
        indices: Iterator[int],
        kept: Mapping[int, ScoredGroup],
        share: Callable[[int], tuple[int, int]],
        version: Callable[[], int],
        time: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._prompts = prompts
        self._sample = sample
        self._pool = pool
        self._score = score
        self._shelf = shelf
        self._max_age = max_age
        self._indices = indices
        self._kept = dict(kept)
        self._share = share
        self._version = version
        self._time = time
        self._idle = IdleClock()
        # Guards the shelf and what follows; notified whenever a step may have become ready.
        self._changed = threading.Condition()
        self._is_closing = False
        self._to_cancel: list[int] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sample ahead")
        self._running: Future[None] | None = None

    def __enter__(self) -> BufferedSource:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the requests in flight and the thread. May be called twice."""
        with self._changed:
            self._is_closing = True
        self._thread.shutdown()

    def take_used(self) -> list[int]:
        """The prompts that were handed out or dropped since the last call."""
        with self._changed:
            return self._shelf.take_used()

    def finished(self) -> list[ScoredGroup]:
        """The groups that are finished and were not handed out."""
        with self._changed:
            return self._shelf.finished()

    def take(self, request: RolloutRequest) -> TakenRollouts:
        """This replica's share of the step's groups; waits until they are finished.

        Raises:
            EnginesLostError: too few engines serve; sampling goes on when enough do.
            EngineError: sampling ended; or a token is older than `rollout.max_policy_age` allows,
                or newer than the last publication, because an engine was restarted or another run
                publishes to it.
        """
        step, (_, count) = request.step, self._share(request.num_prompts)
        with self._time("rollout"), self._changed:
            late = self._shelf.want(step, count)
            self._to_cancel += late
            self._start_thread()
            self._wait_until_ready(step, count)
            groups = self._shelf.take(step, count)
            num_ahead = len(self._shelf.finished())
        if late:
            logger.warning("step %d: dropped the groups of prompts %s as too old", step, late)
        self._check_ages(groups, request)
        return TakenRollouts(
            groups=tuple(groups),
            num_prompts=request.num_prompts,
            num_rounds=1,
            is_whole_step=False,
            metrics=self._metrics(groups, step, num_late=len(late), num_ahead=num_ahead),
        )

    def _wait_until_ready(self, step: int, count: int) -> None:
        begin = told = time.monotonic()
        while not self._shelf.is_ready(step, count):
            if self._running is not None and self._running.done():
                self._running.result()
                raise EngineError("rollouts: expected sampling to go on, got the end of its thread")
            if shortage := self._pool.shortage():
                raise EnginesLostError(shortage)
            self._changed.wait(1.0)
            now = time.monotonic()
            if now - told > TELL_SECONDS:
                told = now
                logger.warning(
                    "step %d has waited %.0f s for prompts %s; %s",
                    step,
                    now - begin,
                    self._shelf.unfinished(),
                    self._pool.last_answers(),
                )

    def _check_ages(self, groups: Sequence[ScoredGroup], request: RolloutRequest) -> None:
        oldest, newest = request.step - 1 - self._max_age, request.weight_version
        for scored in groups:
            for rollout in scored.group.rollouts:
                versions = rollout.weight_versions[rollout.loss_mask]
                if len(versions) and not oldest <= versions.min() <= versions.max() <= newest:
                    raise EngineError(
                        f"prompt {scored.group.prompt.index}: expected samples of weight versions "
                        f"{oldest} to {newest}, got {sorted(set(versions.tolist()))}; was the "
                        "engine restarted, or published to by another run?"
                    )

    def _metrics(
        self, groups: Sequence[ScoredGroup], step: int, *, num_late: int, num_ahead: int
    ) -> dict[str, Metric]:
        ages = [step - 1 - oldest_version(each, default=step - 1) for each in groups]
        rollouts = [rollout for each in groups for rollout in each.group.rollouts]
        idle, elapsed = self._idle.take()
        return {
            "rollout/age/max": Max(max(ages, default=float("-inf"))),
            "rollout/spanning_rate/mean": mean_of(
                [len(np.unique(each.weight_versions[each.loss_mask])) > 1 for each in rollouts]
            ),
            "rollout/num_late": Sum(float(num_late)),
            "rollout/num_ahead": Sum(float(num_ahead)),
            "rollout/idle_share/mean": Mean(sum=idle, count=elapsed),
        }

    def _start_thread(self) -> None:
        if self._running is None:
            self._running = self._thread.submit(lambda: asyncio.run(self._main()))
            self._running.add_done_callback(self._tell_end)

    def _tell_end(self, _running: Future[None]) -> None:
        with self._changed:
            self._changed.notify_all()

    async def _main(self) -> None:
        """Keep the shelf full until the source is closed; ends with the first error."""
        async with self._pool.session() as sampler:
            watcher = asyncio.create_task(self._pool.watch())
            tasks: dict[int, asyncio.Task[None]] = {}
            try:
                while True:
                    with self._changed:
                        if self._is_closing:
                            return
                        self._cancel_late(tasks)
                        for index, version in self._starts():
                            making = self._make(index, version, sampler)
                            tasks[index] = asyncio.create_task(making)
                    waited_for = {watcher, *tasks.values()}
                    done, _ = await asyncio.wait(
                        waited_for, timeout=TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in done:
                        task.result()  # raises what the task raised
                    tasks = {index: each for index, each in tasks.items() if each not in done}
            finally:
                for task in (watcher, *tasks.values()):
                    task.cancel()
                await asyncio.gather(watcher, *tasks.values(), return_exceptions=True)

    def _cancel_late(self, tasks: dict[int, asyncio.Task[None]]) -> None:
        """End the requests of groups that were dropped."""
        for index in self._to_cancel:
            if index in tasks:
                tasks.pop(index).cancel()
        self._to_cancel.clear()

    def _starts(self) -> list[tuple[int, int]]:
        """Prompts to start now, and the version that the engines serve."""
        version = self._version()
        starts = []
        for _ in range(self._shelf.num_to_start(version)):
            index = next(self._indices)
            self._shelf.start(index, version)
            starts.append((index, version))
        return starts

    async def _make(self, index: int, version: int, sampler: Sampler) -> None:
        """Sample and score the group of one prompt, and put it on the shelf."""
        scored = self._kept.pop(index, None)
        if scored is None:
            [prompt] = self._prompts(index, 1)
            group = await self._sample_group(prompt, version, sampler)
            [scores] = await asyncio.to_thread(self._score, [group])
            scored = ScoredGroup(group=group, scores=tuple(scores))
        with self._changed:
            self._shelf.finish(scored)
            self._changed.notify_all()

    async def _sample_group(self, prompt: Prompt, version: int, sampler: Sampler) -> RolloutGroup:
        """Sample the group of one prompt; if too few engines are left on the way, again, with the
        same seeds, when enough serve.
        """
        while True:
            try:
                with self._idle.busy():
                    return await self._sample(prompt, version, sampler)
            except EnginesLostError:
                while self._pool.shortage():
                    await asyncio.sleep(TICK_SECONDS)
