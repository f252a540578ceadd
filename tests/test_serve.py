"""The engine that a user starts: answers its token, is taken by a run, and ends on Ctrl-C."""

from __future__ import annotations

import signal
import socket
import stat
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from megatron_rl.config import (
    Config,
    EvalConfig,
    EvalSetConfig,
    ModelConfig,
    RolloutConfig,
    SamplingConfig,
)
from megatron_rl.engine import server
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.server import check_given, given_addresses
from megatron_rl.engine.token import token_in
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.evaluate import evaluate
from megatron_rl.process.command import Progress
from megatron_rl.records import TOKEN_VARIABLE
from megatron_rl.serve import serve
from tests.support.ports import free_port
from tests.support.processes import is_alive
from tests.support.served_engine import ServedEngine


def test_a_run_takes_it_with_the_token_of_the_file(
    served_engine: ServedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, port = served_engine.url, served_engine.port
    file = served_engine.run_dir / "engine_token"
    assert f'export MEGATRON_RL_TOKEN="$(cat {file})"' in served_engine.greeting.splitlines()[0]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setenv(TOKEN_VARIABLE, token_in(file))
    addresses = given_addresses(RolloutConfig(num_engines=0, urls=[url]))
    check_given(addresses)
    wrong = EngineAddress(url=addresses[0].url, token="another")
    with pytest.raises(EngineError, match=rf"127\.0\.0\.1:{port} to take the token .* refuses"):
        check_given([*addresses, wrong])


def test_ctrl_c_ends_it_and_its_engine(served_engine: ServedEngine) -> None:
    url, port = served_engine.url, served_engine.port
    below = [pid for pid in psutil.pids() if serves_on(pid, port)]
    assert len(below) >= 2  # guard and API server
    ended = served_engine.interrupt()  # whoever needs it after this test starts it anew
    assert ended.code == 128 + signal.SIGINT
    assert f"stopped by SIGINT: the engine at {url}" in ended.stderr
    assert not any(is_alive(pid) for pid in below)


def serves_on(pid: int, port: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"--port" in words and str(port).encode() in words


def test_it_needs_a_port() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.port: expected the port"):
        serve(Config(), Progress())


class StartedEngine:
    """In place of an engine's process; `serve` ends when it waits for the first one."""

    started: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, *, reservation: socket.socket, **keywords: Any) -> None:
        self.address, self.log_path = keywords["address"], keywords["log_path"]
        self.started.append({**keywords, "bound": reservation.getsockname()[0]})
        reservation.close()

    def wait_ready(self) -> None:
        raise EngineError("stop here")

    def stop(self) -> None: ...

    def __enter__(self) -> StartedEngine:
        return self

    def __exit__(self, *_exception: object) -> None: ...


@pytest.mark.parametrize("command", ["serve", "serve nodes", "evaluate"])
def test_engines_are_told_to_listen_on_loopback_alone(
    command: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own default is every interface, for its server and for what its processes say to each
    other.
    """
    monkeypatch.setattr(server, "Engine", StartedEngine)
    monkeypatch.setattr(StartedEngine, "started", [])
    for variable in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "0.0.0.0")
    nodes = RolloutConfig(num_engines=2, placement="nodes")
    rollout = nodes if command == "serve nodes" else RolloutConfig(num_engines=2, port=free_port(2))
    sampling = SamplingConfig(max_tokens=8)
    questions = EvalSetConfig(name="chain_sum", num_rows=2, sampling=sampling)
    config = Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_checkpoint)),
        rollout=rollout,
        eval=EvalConfig(sets=[questions]),
    )
    with pytest.raises(EngineError, match="stop here"):
        if command == "evaluate":
            evaluate(config, Progress())
        else:
            serve(config, Progress(), num_engines=2)
    assert len(StartedEngine.started) == 2
    for each in StartedEngine.started:
        words, variables = each["command"], each["environment"]
        assert words[words.index("--host") + 1] == each["bound"] == "127.0.0.1"
        assert words.count("--host") == 1
        assert variables["VLLM_HOST_IP"] == "127.0.0.1"
        assert variables["GLOO_SOCKET_IFNAME"] == variables["NCCL_SOCKET_IFNAME"] == "lo"
        assert each["address"].url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    "arguments", [["--host", "0.0.0.0"], ["--host=::"], ["--port", "80"], ["--uds", "/tmp/socket"]]
)
def test_where_an_engine_listens_is_no_extra_argument(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"^extra_args: expected no {arguments[0][:5]}.*rollout"):
        RolloutConfig(extra_args=["--swap-space", "0", *arguments])
    RolloutConfig(extra_args=["--hf-overrides", "{}", "--host-memory", "3"])


def test_a_token_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "run" / "engine_token"
    token = token_in(file)
    assert len(token) >= 32 and token_in(file) == token
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 0600, got \d+ characters and mode 0644"):
        token_in(file)
