"""The engines that serve a run, as all its ranks agree on them: which are left out, started again,
and taken in with the weights of a publication.

Requests, health checks and the engines' processes are watched by single ranks (engine/roster.py).
What they find is brought together at the end of each round of rollouts, before each publication,
and after one that failed. An engine that this run started is started again at once and loads while
the run goes on with the others; it serves after the next publication, which sends it the full
weights as it does to all. If too few engines serve, the run waits for them and publishes again the
weights that the others have, and the requests that are not answered go out again.

Engines that share GPUs with the learner start only while they may have the memory: a lost one is
ended, and is started again when the others wake up; one that loads is waited for before the others
fall asleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.health import is_alive, is_back, reason_of_silence
from megatron_rl.engine.roster import Roster
from megatron_rl.errors import EngineError
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.process.guard import DEATH_SECONDS

LOOK_SECONDS = 0.5  # between looks at engines that are starting

# Calls these engines; the reason of each that failed (`Publisher.sleep`, `Publisher.wake`).
Call = Callable[[Sequence[str]], Mapping[str, str]]


class OwnEngines(Protocol):
    """The engines that a rank has started; `loop.engines.RunEngines` implements it."""

    @property
    def own(self) -> set[str]:
        """Their URLs."""
        ...

    @property
    def restartable(self) -> set[str]:
        """Those that may be started again."""
        ...

    @property
    def restarting(self) -> set[str]:
        """Those that were started again and are not ready yet."""
        ...

    def ended(self) -> dict[str, str]:
        """Those whose processes have ended, with the reason."""
        ...

    def restart(self, url: str) -> None:
        """Start one again, without waiting for it."""
        ...

    def halt(self, url: str) -> None:
        """End one."""
        ...

    def restarted(self) -> set[str]:
        """Those that were started again and are ready, each once."""
        ...


class Crew:
    """The engines of a run; one on every rank. Methods that are collectives say so.

    Args:
        engines: those of this rank, which it starts again.
        addresses: of all engines, the same on every rank.
        roster: of this rank, which its pool shares.
        say: tells the user a line; does so on rank 0.
    """

    def __init__(
        self,
        engines: OwnEngines,
        addresses: Sequence[EngineAddress],
        roster: Roster,
        parallel: Parallel,
        config: RolloutConfig,
        say: Callable[[str], None],
    ) -> None:
        self._engines, self._roster, self._parallel = engines, roster, parallel
        self._addresses = {address.url: address for address in addresses}
        self._config, self._say = config, say
        self._is_told: set[str] = set()  # of the engines that are left out
        self._chosen = tuple(self._addresses)  # for the last publication
        self._ready: set[str] = set()  # of those that are left out: started again, to be taken in
        self._failed: dict[str, str] = {}  # of these, until all ranks know it
        self._may_start = True  # engines have the memory that they share with the learner
        self._halted: set[str] = set()  # of this rank's: are started when engines have the memory

    @property
    def serving(self) -> tuple[str, ...]:
        """The URLs of the engines that serve, as this rank knows them."""
        return self._roster.serving

    def agree(self, shortage: str = "") -> str:
        """Bring together which engines are left out, and start those again that this run started. A
        collective over all ranks.

        Args:
            shortage: why this rank cannot go on; "" if it can.

        Returns:
            Why a rank cannot go on, the same on every rank; "" if all can.
        """
        ended = self._engines.ended()
        for url, reason in ended.items():
            self._roster.leave_out(url, reason)
        again = {url: why for url, why in (self._failed | ended).items() if url in self._ready}
        own = (self._roster.lost, self._engines.restartable, shortage, again)
        reports = self._parallel.from_all_ranks(own)
        for lost, _, _, _ in reports:
            for url, reason in lost.items():
                self._roster.leave_out(url, reason)
        for _, _, _, lost_again in reports:
            for url, reason in lost_again.items():
                self._roster.lose_again(url, reason)
                self._ready.discard(url)
                self._is_told.discard(url)
        self._failed = {}
        restartable = set().union(*(of_rank for _, of_rank, _, _ in reports))
        for url, reason in self._roster.lost.items():
            if url not in self._is_told:
                self._is_told.add(url)
                self._leave_out(url, reason, is_restartable=url in restartable)
        return next((told for _, _, told, _ in reports if told), "")

    def gather(self) -> tuple[tuple[str, ...], bool]:
        """The engines that take part in the next publication: those that serve, and those that are
        back; and whether they are not the processes of the last one. Waits for engines that are
        starting if there are too few. A collective over all ranks.

        Raises:
            EngineError: there are too few, and nobody starts one.
        """
        self.agree()
        while True:
            self._ready |= self._back()
            chosen = self._running
            if len(chosen) >= self._config.min_engines:
                has_changed = chosen != self._chosen or bool(self._ready)
                self._chosen = chosen
                return chosen, has_changed
            if not self._parallel.any_rank(bool(self._engines.restarting)):
                raise EngineError(self._roster.shortage())
            time.sleep(LOOK_SECONDS)

    def take_in(self, urls: Sequence[str]) -> None:
        """These engines have the weights that were published, and serve."""
        for url in urls:
            self._ready.discard(url)
            if url in self._is_told:
                self._is_told.discard(url)
                self._roster.take_in(url)
                self._say(f"engine {url}: serves again, with the present weights")

    def examine(self, urls: Sequence[str]) -> bool:
        """After a publication that failed: look which of its engines answer, and leave the others
        out. A collective over all ranks; whether one was left out.
        """
        time.sleep(DEATH_SECONDS)
        seconds = self._config.health_timeout_seconds
        if self._parallel.rank == 0:
            ended = self._engines.ended()
            for url in (each for each in self._running if each in urls and each not in ended):
                if not is_alive(self._addresses[url], seconds):
                    self._lose(url, reason_of_silence(url, seconds))
        self.agree()
        return not set(urls) <= set(self._running)

    def fall_asleep(self, sleep: Call | None) -> None:
        """Let all engines leave the memory that they share with the learner. Those that are
        starting are waited for, and those that fail are ended. A collective over all ranks.

        Args:
            sleep: on rank 0; None elsewhere.
        """
        self.agree()
        while self._parallel.any_rank(bool(self._engines.restarting)):
            time.sleep(LOOK_SECONDS)
            self._ready |= self._back()
        self._may_start = False
        self._call_all(sleep)

    def wake_up(self, wake: Call | None) -> None:
        """The engines have the memory again: wake those that sleep, and start those that were lost
        meanwhile. A collective over all ranks.

        Args:
            wake: on rank 0; None elsewhere.
        """
        self._may_start = True
        for url in sorted(self._halted):
            self._engines.restart(url)
        self._halted = set()
        self._call_all(wake)

    @property
    def _running(self) -> tuple[str, ...]:
        """Those that serve, and those that are ready to be taken in; the same on every rank."""
        urls = self._roster.urls
        return tuple(url for url in urls if url in self._ready or self._roster.is_serving(url))

    def _call_all(self, call: Call | None) -> None:
        """Leave those engines out of which the call fails; a collective over all ranks."""
        failures = {} if call is None else dict(call(self._running))
        failures = self._parallel.from_first_rank(failures)
        if failures:
            time.sleep(DEATH_SECONDS)
            self.agree()  # the report of an engine's end is preferred, because it tells the cause
            for url, reason in failures.items():
                self._lose(url, reason)
            self.agree()

    def _lose(self, url: str, reason: str) -> None:
        if url in self._ready:
            self._failed[url] = reason
        else:
            self._roster.leave_out(url, reason)

    def _leave_out(self, url: str, reason: str, *, is_restartable: bool) -> None:
        first, *rest = reason.splitlines()
        if url in self._engines.restartable and self._may_start:
            self._engines.restart(url)
        elif url in self._engines.own:  # it may hold memory that others need
            self._engines.halt(url)
            if url in self._engines.restartable:
                self._halted.add(url)
        num_serving = len(self._roster.serving)
        told = "it is started again" if is_restartable else "nobody starts it again"
        self._say(f"{first}; {told}, {num_serving} of {len(self._roster.urls)} serve")
        for line in rest:
            self._say(line)

    def _back(self) -> set[str]:
        """The engines that are left out and ready to serve again, the same on every rank."""
        ready, own = self._engines.restarted(), self._engines.own
        reports = self._parallel.from_all_ranks((ready, own))
        started = set().union(*(of_rank for _, of_rank in reports))
        back = set().union(*(of_rank for of_rank, _ in reports))
        if self._parallel.rank == 0:  # somebody else may have started the others again
            back |= {
                url
                for url in self._roster.lost
                if url not in started
                and not self._roster.has_answered_invalidly(url)
                and is_back(self._addresses[url], LOOK_SECONDS)
            }
        return self._parallel.from_first_rank(back)
