"""Start, supervise and stop stock vLLM servers on this host.

`start_engines` takes the rollout settings, a checkpoint folder and the run's token, and returns
`Engine`s with an address. vLLM runs in separate processes and is never imported here. Each server
runs under a guard (process/guard.py) and behind a gate (engine/gate.py):

    rank -> guard -> API server -> EngineCore (-> one worker per device, if there are several)

Starting a server does not wait until it is ready, so that the learner can initialise in the
meantime; `Engine.wait_ready` waits. Servers that were started elsewhere (`rollout.urls`) are
checked once, by `check_given`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.http import ReadinessProbe
from megatron_rl.engine.launch import server_command, server_environment
from megatron_rl.engine.placement import EnginePlace
from megatron_rl.engine.requests import num_requested_logprobs
from megatron_rl.engine.server_log import Cause, find_cause, last_words
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.process.listener import listens
from megatron_rl.process.loopback import HOST
from megatron_rl.records import TOKEN_VARIABLE, WEIGHT_BACKEND

STOP_SECONDS = 8.0
PROBE_TIMEOUT_SECONDS = 5.0  # for one request to a server that is starting
GIVEN_TIMEOUT_SECONDS = 10.0  # for one request to a given server


class Engine:
    """A vLLM server under its guard. Use it as a context manager, or call `stop`.

    `address` is known at once; the server answers there after `wait_ready`.
    """

    def __init__(
        self,
        *,
        index: int,
        command: list[str],
        environment: dict[str, str],
        log_path: Path,
        reservation: socket.socket,
        address: EngineAddress,
        startup_timeout_seconds: float,
    ) -> None:
        self.address = address
        self.log_path = log_path
        self._name = f"engine {index} ({address.url})"
        self._startup_timeout_seconds = startup_timeout_seconds
        self._started_at = time.monotonic()
        # The socket is bound but not listening, so that no other process can take the port before
        # the server binds it too.
        self._reservation = reservation
        self._port: int = reservation.getsockname()[1]
        self._is_ready = False
        self._is_stopped = False
        self._command, self._environment = command, environment
        self._start()

    @property
    def host(self) -> str:
        """The address of this host that the server listens on."""
        return urlsplit(self.address.url).hostname or HOST

    @property
    def pid(self) -> int:
        """Process id of the guard. All processes of the server are its descendants."""
        return self._guard.pid

    def check(self) -> None:
        """Raise EngineError with how the server ended, the cause and its line in the log if it has
        died. Cheap enough to be called often.
        """
        code = self._guard.poll()
        if code is None or self._is_stopped:
            return
        lines, first = self._log_lines()
        cause = find_cause(lines, is_signal=code < 0 or code > 128)
        is_core_gone = cause is not None and not cause.text
        if code < 0:
            ended = f"its guard was ended by {signal.Signals(-code).name}"
        elif code > 128:
            ended = f"ended by {signal.Signals(code - 128).name}"
        elif is_core_gone:
            ended = "its EngineCore process died"
        else:
            ended = f"exited with code {code}"
        when = "while serving" if self._is_ready else "before it was ready"
        if code == 128 + signal.SIGKILL or is_core_gone:
            when += " (killed by the kernel, if memory ran out: see dmesg)"
        raise EngineError(f"{self._name}: {ended} {when}{self._told(lines, cause, first)}")

    def is_alive(self) -> bool:
        """Whether the server is still running."""
        return self._guard.poll() is None

    def wait_ready(self) -> None:
        """Return when the server accepts the token.

        Raises:
            EngineError: the server died or was not ready within `rollout.startup_timeout_seconds`,
                or another process answers on its port.
        """
        with ReadinessProbe(self.address, PROBE_TIMEOUT_SECONDS) as probe:
            while not self._has_become_ready(probe):
                time.sleep(0.1)

    def is_ready(self) -> bool:
        """Whether the server accepts the token by now; raises as `wait_ready`."""
        with ReadinessProbe(self.address, PROBE_TIMEOUT_SECONDS) as probe:
            return self._is_ready or self._has_become_ready(probe)

    def restart(self) -> None:
        """End the server, whatever state it is in, and start it again at the same address, without
        waiting for it. It has the weights of its checkpoint.

        Raises:
            EngineError: another process has taken the port.
        """
        self.stop()
        self._reservation = _reserve_port(self.host, self._port)
        self._is_ready = self._is_stopped = False
        self._started_at = time.monotonic()
        self._start()

    def _has_become_ready(self, probe: ReadinessProbe) -> bool:
        self.check()
        if not probe.is_up():
            if time.monotonic() <= self._started_at + self._startup_timeout_seconds:
                return False
            self.stop()
            lines, first = self._log_lines()
            told = self._told(lines, find_cause(lines, is_signal=False), first)
            raise EngineError(
                f"{self._name}: expected it to be ready within "
                f"rollout.startup_timeout_seconds={self._startup_timeout_seconds:g}, it is "
                f"not{told}"
            )
        # Checked before the token is sent, because another server may have taken the port and must
        # not receive the token.
        self.check()
        if not listens(self._guard.pid, self._port) or not probe.accepts_token():
            self.stop()
            raise EngineError(
                f"{self._name}: expected the started server, somebody else's answers; "
                "choose another rollout.port"
            )
        self._reservation.close()
        self._is_ready = True
        return True

    def _start(self) -> None:
        with open(self.log_path, "ab") as log:
            self._log_start = log.tell()
            self._guard = _start_guard(self._command, self._environment, log)

    def stop(self) -> None:
        """End the server and all processes under its guard; returns when they have ended."""
        self._is_stopped = True
        self._reservation.close()
        self._guard.stdin.close()  # the guard ends the server when its stdin closes
        try:
            self._guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            _end_group(self._guard.pid)
            self._guard.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _log_lines(self) -> tuple[list[str], int]:
        """The lines that this server wrote to the log, and the number of the first one."""
        content = self.log_path.read_bytes()
        before, own = content[: self._log_start], content[self._log_start :]
        return own.decode(errors="replace").split("\n"), before.count(b"\n") + 1

    def _told(self, lines: Sequence[str], cause: Cause | None, first: int) -> str:
        """The end of a message: the cause and where it stands, or the last line of the log."""
        if cause is not None:
            what = f": {cause.text}" if cause.text else ""
            return f"{what}; see {self.log_path}, line {first + cause.line}"
        said = last_words(lines)
        return f"; its log {self.log_path} " + (f"ends with: {said}" if said else "is empty")


def start_engines(
    config: RolloutConfig,
    *,
    model_path: str,
    log_dir: Path,
    token: str,
    seed: int,
    update_timeout_seconds: float,
    weight_backend: str | None = WEIGHT_BACKEND,
    num_logprobs: int = 0,
    host: str = HOST,
    places: Sequence[EnginePlace] | None = None,
    returns_routes: bool = False,
) -> list[Engine]:
    """Start servers concurrently, without waiting for them. `Engine.wait_ready` reports a start
    that failed.

    Args:
        host: the address of this host that they listen on.
        places: the engines to start; None: all `config.num_engines`, with the GPUs of this process.
        token: the run's bearer token.
        seed: for the engine's own random state; every request for samples has its own seed.
        update_timeout_seconds: an update that is unfinished for this long poisons the engine
            (sync.timeout_seconds).
        weight_backend: backend of vLLM's weight-transfer API; None if the weights never change.
        num_logprobs: K of the heads that requests may ask for; 0: they ask for none.
        returns_routes: whether answers have the experts of every token.

    Raises:
        EngineError: a port is already in use.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    if places is None:
        places = [EnginePlace(index=i, node=0, gpus=()) for i in range(config.num_engines)]
    engines: list[Engine] = []
    try:
        for number, place in enumerate(places):
            reservation = _reserve_port(host, config.port + number if config.port else 0)
            port = reservation.getsockname()[1]
            engine = Engine(
                index=place.index,
                command=server_command(
                    config,
                    model_path=model_path,
                    port=port,
                    seed=seed,
                    weight_backend=weight_backend,
                    num_logprobs=num_logprobs,
                    host=host,
                    returns_routes=returns_routes,
                ),
                environment=server_environment(
                    config,
                    token=token,
                    update_timeout_seconds=update_timeout_seconds,
                    host=host,
                    gpus=place.gpus,
                ),
                log_path=log_dir / f"engine_{place.index}.log",
                reservation=reservation,
                address=EngineAddress(url=f"http://{host}:{port}", token=token, place=str(place)),
                startup_timeout_seconds=config.startup_timeout_seconds,
            )
            engines.append(engine)
    except BaseException:
        for engine in engines:
            engine.stop()
        raise
    return engines


def given_addresses(config: RolloutConfig) -> list[EngineAddress]:
    """Addresses of the servers in `config.urls`, with the token from the environment.

    Raises:
        ConfigError: the environment has no token.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if config.urls and not token:
        raise ConfigError(
            f"rollout.urls: expected the servers' token in {TOKEN_VARIABLE}, it is not set"
        )
    return [EngineAddress(url=url.rstrip("/"), token=token) for url in config.urls]


def check_given(addresses: Sequence[EngineAddress]) -> None:
    """Check that every given server is ready, requires a token, and accepts the run's token.

    Raises:
        EngineError: a check failed; the message names the URL of the first such server.
    """
    for address in addresses:
        with ReadinessProbe(address, GIVEN_TIMEOUT_SECONDS) as probe:
            if not probe.is_up():
                raise EngineError(
                    f"rollout.urls: expected a server that is ready at {address.url}, none "
                    "answers; start it with python -m megatron_rl.serve"
                )
            if probe.answers_anybody():
                raise EngineError(
                    f"rollout.urls: expected the server at {address.url} to ask for a token, it "
                    "answers anybody; start it with python -m megatron_rl.serve"
                )
            if not probe.accepts_token():
                raise EngineError(
                    f"rollout.urls: expected the server at {address.url} to take the token in "
                    f"{TOKEN_VARIABLE}, it refuses it"
                )


def check_max_logprobs(addresses: Sequence[EngineAddress], num_logprobs: int) -> None:
    """Check that every server, started or given, sends heads of K log-probs.

    Args:
        num_logprobs: K; 0: nothing is checked.

    Raises:
        EngineError: the message names the URL of the first server that refuses them.
    """
    if not num_logprobs:
        return
    wanted = num_requested_logprobs(num_logprobs)
    for address in addresses:
        with ReadinessProbe(address, GIVEN_TIMEOUT_SECONDS) as probe:
            if probe.refuses_logprobs(wanted):
                raise EngineError(
                    f"objective.score_centering.num_logprobs={num_logprobs}: expected an engine at "
                    f"{address.url} that sends {wanted} log-probs a token, it refuses them; start "
                    f"it with --max-logprobs {wanted} (rollout.extra_args), or with python -m "
                    "megatron_rl.serve and this config"
                )


def check_returned_routes(addresses: Sequence[EngineAddress]) -> None:
    """Check that every server, started or given, returns the experts of its tokens.

    Raises:
        EngineError: the message names the URL of the first server that does not.
    """
    for address in addresses:
        with ReadinessProbe(address, GIVEN_TIMEOUT_SECONDS) as probe:
            if not probe.returns_routes():
                raise EngineError(
                    "learner.moe.routing_replay=rollout: expected an engine at "
                    f"{address.url} that returns routed experts, got an answer without; start it "
                    "on a GPU with --enable-return-routed-experts, or set "
                    "learner.moe.routing_replay=recomputed"
                )


def _start_guard(
    command: list[str], environment: dict[str, str], log: BinaryIO
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_rl.process.guard", *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        # A session of its own: Ctrl-C must reach only the ranks, which then stop the engines.
        start_new_session=True,
    )


def _reserve_port(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen. Both this socket and vLLM's server set SO_REUSEADDR, so
    that the server can bind the same port.
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reservation.bind((host, port))
    except OSError as error:
        reservation.close()
        raise EngineError(
            f"rollout.port: expected a free port, {port} cannot be bound ({error.strerror}); "
            "choose another one, or 0 for any free ones"
        ) from error
    return reservation


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # no process is left in the group
