"""The engines of a run: those that it starts on its nodes, those that were started for it, and
those whose addresses it is given.

The first rank of a node starts the engines of that node. Rank 0 finds and claims the others, and
all ranks learn all addresses.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from megatron_rl.config import Config
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.claims import Claims
from megatron_rl.engine.placement import sleeps
from megatron_rl.engine.registry import wait_for_registered
from megatron_rl.engine.server import (
    Engine,
    check_given,
    check_max_logprobs,
    check_returned_routes,
    given_addresses,
)
from megatron_rl.engine.start import listening_address, start_engines_of
from megatron_rl.engine.token import TOKEN_FILE, token_in
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.process.interface import is_local
from megatron_rl.process.lifetime import register_cleanup
from megatron_rl.process.node import Node, is_first_of_node
from megatron_rl.records import TOKEN_VARIABLE
from megatron_rl.sync.transports.transport import has_many_sources


class RunEngines:
    """The engines as one rank of a run sees them.

    Args:
        stack: ends the engines that this rank starts, and gives claims back.
        say: tells the user a line.
    """

    def __init__(
        self, config: Config, node: Node, stack: ExitStack, say: Callable[[str], None]
    ) -> None:
        self._config, self._node, self._stack, self._say = config, node, stack, say
        self._token = ""
        self._started: list[Engine] = []
        self._num_restarts: dict[str, int] = {}
        self._restarting: set[str] = set()
        self._reasons: dict[str, str] = {}  # of the engines that have ended
        self._claims: Claims | None = None

    def start_first(self) -> None:
        """On rank 0, before there are process groups: start the engines of the first node, which
        then load while the learner loads.
        """
        rollout = self._config.rollout
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        if not self._token and rollout.placement == "nodes":
            self._token = token_in(Path(self._config.run_dir) / TOKEN_FILE)
        self._token = self._token or secrets.token_urlsafe(32)
        self._start()

    def start_others(self, parallel: Parallel) -> None:
        """Start the engines of the other nodes. A collective over all ranks if there are any."""
        if self._node.count == 1:
            return
        self._token = parallel.from_first_rank(self._token)
        if is_first_of_node() and parallel.rank != 0:
            self._start()

    def addresses(self, parallel: Parallel) -> Sequence[EngineAddress]:
        """The addresses of all engines. A collective over all ranks; it returns when all engines
        answer, and those that this run did not start are claimed.

        Raises:
            EngineError: an engine does not start or answer, or another run holds it.
            ConfigError: weights cannot be sent to where an engine is.
        """
        for engine in self._started:
            engine.wait_ready()
        own = [engine.address for engine in self._started]
        if self._node.count > 1:
            own = [address for of_rank in parallel.from_all_ranks(own) for address in of_rank]
        addresses: list[EngineAddress] = []
        if parallel.rank == 0:
            given = self._given()
            addresses = [*own, *given]
            check_max_logprobs(addresses, self._config.objective.score_centering.num_requested)
            if self._config.learner.moe.routing_replay == "rollout":
                check_returned_routes(addresses)
            check_reach(self._config.sync.transport, addresses)
            if given:
                self._claims = Claims(given, Path(self._config.run_dir))
                register_cleanup(self._claims.release)
                self._stack.enter_context(self._claims)
            self._say(engine_map(addresses))
            placement, device = self._config.rollout.placement, parallel.device.type
            if placement == "colocated" and not sleeps(placement, device):
                self._say(
                    "rollout.placement=colocated: the engines stay awake, since on CPUs sleep "
                    "frees no memory"
                )
        return parallel.from_first_rank(addresses)

    def check(self) -> None:
        """Raise EngineError if another run has taken an engine that this run had claimed."""
        if self._claims is not None:
            self._claims.check()

    def ended(self) -> dict[str, str]:
        """The engines of this rank whose processes have ended, by URL, with what ended, the cause
        and its line in the log.
        """
        for engine in self._started:
            if engine.address.url not in self._reasons:  # the log is read once
                try:
                    engine.check()
                except EngineError as error:
                    self._reasons[engine.address.url] = str(error)
        return dict(self._reasons)

    @property
    def own(self) -> set[str]:
        """The URLs of the engines that this rank starts."""
        return {engine.address.url for engine in self._started}

    @property
    def restartable(self) -> set[str]:
        """The URLs of the engines that this rank may start again."""
        most = self._config.rollout.max_restarts
        return {url for url in self.own if self._num_restarts.get(url, 0) < most}

    def restart(self, url: str) -> None:
        """Start an engine of this rank again, without waiting for it. It counts as restarting until
        `restarted` returns it.
        """
        [engine] = [each for each in self._started if each.address.url == url]
        self._num_restarts[url] = self._num_restarts.get(url, 0) + 1
        self._restarting.add(url)
        self._reasons.pop(url, None)
        engine.restart()

    def halt(self, url: str) -> None:
        """End an engine of this rank, whatever state it is in."""
        [engine] = [each for each in self._started if each.address.url == url]
        self._restarting.discard(url)
        engine.stop()

    @property
    def restarting(self) -> set[str]:
        """The URLs of the engines of this rank that were started again and are not ready yet."""
        return set(self._restarting)

    def restarted(self) -> set[str]:
        """The engines of this rank that were started again and are ready, each once; one that does
        not start is started again as often as is allowed.
        """
        ready = set()
        for engine in self._started:
            url = engine.address.url
            if url not in self._restarting:
                continue
            try:
                is_ready = engine.is_ready()
            except EngineError as error:
                self._restarting.discard(url)
                self._say(str(error))
                if url in self.restartable:
                    self.restart(url)
                continue
            if is_ready:
                self._restarting.discard(url)
                ready.add(url)
        return ready

    def _start(self) -> None:
        run_dir, node = Path(self._config.run_dir), self._node
        self._started = start_engines_of(
            self._config,
            run_dir if node.index == 0 else run_dir / f"node_{node.index}",
            log_dir=run_dir / "logs",
            token=self._token,
            node=node,
            host=listening_address(self._config.rollout, node),
        )
        for engine in self._started:
            self._stack.callback(engine.stop)
            register_cleanup(engine.stop)

    def _given(self) -> list[EngineAddress]:
        rollout = self._config.rollout
        if rollout.placement == "nodes" and rollout.num_engines:
            return wait_for_registered(
                Path(self._config.run_dir),
                rollout.num_engines,
                self._token,
                rollout.startup_timeout_seconds,
                self._say,
            )
        given = given_addresses(rollout)
        check_given(given)
        return given


def engine_map(addresses: Sequence[EngineAddress]) -> str:
    """One line that says where the engines are."""
    places = (f"{each.url} ({each.place or 'given'})" for each in addresses)
    return f"engines: {', '.join(places)}"


def check_reach(transport: str, addresses: Sequence[EngineAddress]) -> None:
    """Raise ConfigError if an engine is on another host and the transport does not go there."""
    if has_many_sources(transport):
        return
    for address in addresses:
        host = urlsplit(address.url).hostname or ""
        if not is_local(host):
            raise ConfigError(
                f"sync.transport={transport}: expected engines on the host of rank 0, got "
                f"{address.url}; choose sync.transport=collective"
            )
