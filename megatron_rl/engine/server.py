"""[door: vllm] Start, watch and stop stock vLLM servers on this host.

In: RolloutConfig, a checkpoint folder, the run's token. Out: Engines with an address. vLLM is a
process of its own and never imported here. Each server runs below a guard (process/guard.py),
behind a gate (engine/gate.py):

    rank -> guard -> API server -> EngineCore (-> one worker a device, where there are several)

Starting does not wait, so that the learner can initialise meanwhile; `Engine.wait_ready` does.
Servers that somebody else started (`rollout.urls`) are looked at once, by `check_given`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import httpx
import torch

from megatron_rl.config import RolloutConfig
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.process.listener import listens
from megatron_rl.records import TOKEN_VARIABLE, WEIGHT_BACKEND, EngineAddress

HOST = "127.0.0.1"
UPDATE_TIMEOUT_VARIABLE = "MEGATRON_RL_UPDATE_TIMEOUT"
GATE = "megatron_rl.engine.gate.Gate"
TAIL_LINES = 20
STOP_SECONDS = 8.0
GIVEN_TIMEOUT_SECONDS = 10.0  # of a question to a given server
# What torchrun tells its ranks; an engine is no rank.
TORCHRUN_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|OMP_.*"
)
# "(EngineCore pid=17) ERROR 11-22 20:14:19 [core.py:133] " before a line of vLLM's log
LOG_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]+\] ?)?")
REASON = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt): .+|^\S+: error: .+")


class Engine:
    """A vLLM server below its guard. Use it as a context manager, or call `stop`.

    `address` is known from the start, the server answers there after `wait_ready`.
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
        # Bound, but not listening: keeps the port from others until the server has bound it too.
        self._reservation = reservation
        self._is_ready = False
        self._is_stopped = False
        with open(log_path, "ab") as log:
            self._log_start = log.tell()
            self._guard = _start_guard(command, environment, log)

    @property
    def pid(self) -> int:
        """Of the guard; everything below it is in its process group."""
        return self._guard.pid

    def check(self) -> None:
        """Raise EngineError with exit code and last lines if the server died; cheap."""
        code = self._guard.poll()
        if code is None or self._is_stopped:
            return
        if code < 0:
            ended = f"its guard was ended by {signal.Signals(-code).name}"
        elif code > 128:
            ended = f"ended by {signal.Signals(code - 128).name}"
        else:
            ended = f"exited with code {code}"
        when = "while serving" if self._is_ready else f"before it was ready{self._reason()}"
        raise EngineError(f"{self._name}: {ended} {when}\n{self._tail()}")

    def is_alive(self) -> bool:
        """Whether the server has not ended."""
        return self._guard.poll() is None

    def wait_ready(self) -> None:
        """Return when the server answers behind its token.

        Raises EngineError when it died, when rollout.startup_timeout_seconds is over, or when
        somebody else answers.
        """
        deadline = self._started_at + self._startup_timeout_seconds
        with httpx.Client(base_url=self.address.url, timeout=5.0, trust_env=False) as client:
            while not _answers(client, "/health", {}):
                self.check()
                if time.monotonic() > deadline:
                    self.stop()
                    raise EngineError(
                        f"{self._name}: expected it to be ready within "
                        f"rollout.startup_timeout_seconds={self._startup_timeout_seconds:g}, "
                        f"it is not{self._reason()}\n{self._tail()}"
                    )
                time.sleep(0.1)
            # Before the token is sent: another server that took the port must not get it.
            self.check()
            is_ours = listens(self._guard.pid, httpx.URL(self.address.url).port)
            if not is_ours or not _answers(client, "/version", _bearer(self.address)):
                self.stop()
                raise EngineError(
                    f"{self._name}: expected the started server, somebody else's answers; "
                    "choose another rollout.port"
                )
        self._reservation.close()
        self._is_ready = True

    def stop(self) -> None:
        """End the server and everything below its guard; returns when they are gone."""
        self._is_stopped = True
        self._reservation.close()
        self._guard.stdin.close()  # the guard reads the end of its parent in it
        try:
            self._guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            _end_group(self._guard.pid)
            self._guard.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _tail(self) -> str:
        lines = [line for line in self._log_lines() if line.strip()]
        return f"last lines of {self.log_path}:\n" + "\n".join(lines[-TAIL_LINES:])

    def _reason(self) -> str:
        """The error that ended a start; vLLM's own last one only points to it."""
        lines = [LOG_PREFIX.sub("", line) for line in self._log_lines()]
        reason = ""
        for line, next_line in zip(lines, [*lines[1:], ""]):
            if REASON.match(line) and "root cause above" not in line:
                # pydantic says in the next line what is wrong
                reason = f": {line}{next_line.rstrip() if next_line.startswith('  ') else ''}"
        return reason

    def _log_lines(self) -> list[str]:
        with open(self.log_path, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace").splitlines()


def start_engines(
    config: RolloutConfig,
    *,
    model_path: str,
    log_dir: Path,
    token: str,
    seed: int,
    update_timeout_seconds: float,
    weight_backend: str | None = WEIGHT_BACKEND,
) -> list[Engine]:
    """Start `config.num_engines` servers side by side, without waiting for them; none with
    `config.urls`.

    Args:
        token: the run's bearer token, travels by environment.
        seed: of the engine's own random state; sampling has its own seeds.
        update_timeout_seconds: an update left unfinished this long poisons the engine
        (sync.timeout_seconds).
        weight_backend: of vLLM's weight-transfer API; None: an engine whose weights never change.

    Raises EngineError when a port is taken; a failed start shows in `Engine.wait_ready`.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    engines: list[Engine] = []
    try:
        for index in range(config.num_engines):
            reservation = _reserve_port(config.port + index if config.port else 0)
            port = reservation.getsockname()[1]
            engine = Engine(
                index=index,
                command=_command(config, model_path, port, seed, weight_backend),
                environment=_environment(config, token, update_timeout_seconds),
                log_path=log_dir / f"engine_{index}.log",
                reservation=reservation,
                address=EngineAddress(url=f"http://{HOST}:{port}", token=token),
                startup_timeout_seconds=config.startup_timeout_seconds,
            )
            engines.append(engine)
    except BaseException:
        for engine in engines:
            engine.stop()
        raise
    return engines


def given_addresses(config: RolloutConfig) -> list[EngineAddress]:
    """Addresses of the servers in `config.urls`; their token is in the environment.

    Raises ConfigError where it is not.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if config.urls and not token:
        raise ConfigError(
            f"rollout.urls: expected the servers' token in {TOKEN_VARIABLE}, it is not set"
        )
    return [EngineAddress(url=url.rstrip("/"), token=token) for url in config.urls]


def check_given(addresses: Sequence[EngineAddress]) -> None:
    """Look whether every given server is up, asks for a token, and knows the run's.

    Raises EngineError naming the url of the first that does not.
    """
    for address in addresses:
        client = httpx.Client(base_url=address.url, timeout=GIVEN_TIMEOUT_SECONDS, trust_env=False)
        with client:
            if not _answers(client, "/health", {}):
                raise EngineError(
                    f"rollout.urls: expected a server that is ready at {address.url}, none "
                    "answers; start it with python -m megatron_rl.serve"
                )
            if _answers(client, "/version", {}):
                raise EngineError(
                    f"rollout.urls: expected the server at {address.url} to ask for a token, it "
                    "answers anybody; start it with python -m megatron_rl.serve"
                )
            if not _answers(client, "/version", _bearer(address)):
                raise EngineError(
                    f"rollout.urls: expected the server at {address.url} to take the token in "
                    f"{TOKEN_VARIABLE}, it refuses it"
                )


def _command(
    config: RolloutConfig, model_path: str, port: int, seed: int, weight_backend: str | None
) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model_path, "--host", HOST, "--port", str(port), "--seed", str(seed)]
    command += ["--dtype", config.dtype, "--kv-cache-dtype", config.kv_cache_dtype]
    command += ["--max-num-seqs", str(config.max_num_seqs)]
    command += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
    command += ["--enable-prefix-caching", "--middleware", GATE]
    command += ["--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    if config.max_model_len:
        command += ["--max-model-len", str(config.max_model_len)]
    if weight_backend is not None:
        command += ["--weight-transfer-config", json.dumps({"backend": weight_backend})]
    if torch.cuda.is_available():
        command += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    else:
        # Compiling takes half a minute of every start, and gains nothing that was measured on
        # small models. A given cache size also spares the warm-up, and the demand that most of
        # the host's memory be free.
        cache_bytes = int(config.kv_cache_gib * 2**30)
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(cache_bytes)]
        # After half a prompt vLLM turns a seeded generator back, which a CPU generator cannot do:
        # the engine dies (vllm/v1/worker/gpu_model_runner.py, `gen.set_offset`).
        command += ["--no-enable-chunked-prefill"]
    return command + list(config.extra_args)


def _environment(
    config: RolloutConfig, token: str, update_timeout_seconds: float
) -> dict[str, str]:
    environment = {
        name: value for name, value in os.environ.items() if not TORCHRUN_VARIABLES.fullmatch(name)
    }
    environment.update(
        {
            TOKEN_VARIABLE: token,
            UPDATE_TIMEOUT_VARIABLE: str(update_timeout_seconds),
            "VLLM_SERVER_DEV_MODE": "1",  # the weight routes; the gate closes them to others
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "PYTHONUNBUFFERED": "1",  # the last words of a dying server reach its log
        }
    )
    if not torch.cuda.is_available():
        # One core stays with the API server and the learner, as vLLM's own automatic choice does.
        num_threads = config.num_threads or max(1, len(os.sched_getaffinity(0)) - 1)
        environment.update(
            {
                # The worker lives in EngineCore: a process and its 10 s of imports less.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(num_threads),
                # Threads that spin at barriers take the cores that learner ranks wait for.
                "OMP_WAIT_POLICY": "passive",
                "GOMP_SPINCOUNT": "0",
            }
        )
    return environment


def _start_guard(
    command: list[str], environment: dict[str, str], log: BinaryIO
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_rl.process.guard", *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C in the terminal is for the ranks, which stop the engines
    )


def _reserve_port(port: int) -> socket.socket:
    """A bound socket that does not listen; a server with SO_REUSEADDR, as vLLM's, can bind the
    same port.
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reservation.bind((HOST, port))
    except OSError as error:
        reservation.close()
        raise EngineError(
            f"rollout.port: expected a free port, {port} cannot be bound ({error.strerror}); "
            "choose another one, or 0 for any free ones"
        ) from error
    return reservation


def _bearer(address: EngineAddress) -> dict[str, str]:
    return {"Authorization": f"Bearer {address.token}"}


def _answers(client: httpx.Client, path: str, headers: dict[str, str]) -> bool:
    try:
        return client.get(path, headers=headers).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing was left
