"""The engine that a user starts: answers its token, is taken by a run, and ends on Ctrl-C."""

from __future__ import annotations

import signal
import stat
from pathlib import Path

import psutil
import pytest

from megatron_rl.config import Config, RolloutConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.server import check_given, given_addresses
from megatron_rl.engine.token import token_in
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.process.command import Progress
from megatron_rl.records import TOKEN_VARIABLE
from megatron_rl.serve import serve
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


def test_a_token_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "run" / "engine_token"
    token = token_in(file)
    assert len(token) >= 32 and token_in(file) == token
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 0600, got \d+ characters and mode 0644"):
        token_in(file)
