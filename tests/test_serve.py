"""The engine that a user starts: answers its token, is taken by a run, and ends on Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_rl.config import Config, RolloutConfig
from megatron_rl.engine.server import check_given, given_addresses
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.process.command import Progress
from megatron_rl.records import TOKEN_VARIABLE, EngineAddress
from megatron_rl.serve import serve, token_in
from tests.processes import is_alive
from tests.torchrun import ROOT


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return unused.getsockname()[1]


@pytest.fixture(scope="module")
def served(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """The process, its run folder and its port, once it says that it is ready."""
    run_dir, port = tmp_path_factory.mktemp("served") / "run", free_port()
    config = run_dir.parent / "run.yaml"
    config.write_text("rollout: {dtype: float32, kv_cache_gib: 0.1, max_num_seqs: 8}\n")
    settings = [f"run_dir={run_dir}", f"model.path={tiny_checkpoint}", f"rollout.port={port}"]
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_rl.serve", str(config), *settings],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        while not lines or not lines[-1].startswith("ready at"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        assert f'export MEGATRON_RL_TOKEN="$(cat {run_dir}/engine_token)"' in lines[0]
        yield process, run_dir, port
    finally:
        process.kill()
        process.wait()


def test_a_run_takes_it_with_the_token_of_the_file(
    served: tuple[subprocess.Popen[str], Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run_dir, port = served
    file = run_dir / "engine_token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setenv(TOKEN_VARIABLE, token_in(file))
    addresses = given_addresses(RolloutConfig(num_engines=0, urls=[f"http://127.0.0.1:{port}"]))
    check_given(addresses)
    wrong = EngineAddress(url=addresses[0].url, token="another")
    with pytest.raises(EngineError, match=rf"127\.0\.0\.1:{port} to take the token .* refuses"):
        check_given([*addresses, wrong])


def test_ctrl_c_ends_it_and_its_engine(served: tuple[subprocess.Popen[str], Path, int]) -> None:
    process, _, port = served
    below = [pid for pid in psutil.pids() if serves_on(pid, port)]
    assert len(below) >= 2  # guard and API server
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 128 + signal.SIGINT
    assert f"stopped by SIGINT: the engine at http://127.0.0.1:{port}" in process.stderr.read()
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
