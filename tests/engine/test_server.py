"""Real vLLM servers: ready, refused, failed, killed; nothing of them may be left."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from megatron_rl.config import RolloutConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.server import (
    Engine,
    check_given,
    check_max_logprobs,
    given_addresses,
    start_engines,
)
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.process.guard import find_engine_core
from megatron_rl.process.listener import listens
from tests.support.processes import children_of, descendants_of, is_alive

SMALL = {"dtype": "float32", "kv_cache_gib": 0.1, "max_num_seqs": 8}
GENERATE = {"token_ids": [1, 20], "sampling_params": {"max_tokens": 2, "logprobs": 0}}


def start(config: RolloutConfig, model_path: Path, log_dir: Path) -> list[Engine]:
    return start_engines(
        config,
        model_path=str(model_path),
        log_dir=log_dir,
        token=secrets.token_urlsafe(),
        seed=0,
        update_timeout_seconds=60.0,
    )


def api_server(guard_pid: int) -> int:
    [pid] = [
        pid
        for pid in children_of(guard_pid)
        if b"api_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return pid


def leftovers(pids: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if is_alive(pid)]


def wait_for_death(engine: Engine, seconds: float) -> EngineError:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            engine.check()
        except EngineError as error:
            return error
        time.sleep(0.05)
    raise AssertionError(f"{engine.address} is still said to be alive after {seconds} s")


def post(address: EngineAddress, path: str, body: dict | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {address.token}"}
    return httpx.post(address.url + path, headers=headers, json=body, timeout=30)


def test_only_the_token_opens_a_real_server(engine: Engine) -> None:
    url = engine.address.url
    assert url.startswith("http://127.0.0.1:")
    assert httpx.get(f"{url}/health").status_code == 200
    routes = [
        "/inference/v1/generate",
        "/v1/completions",
        "/start_weight_update",
        "/collective_rpc",
    ]
    for route in routes:
        assert httpx.post(url + route, json=GENERATE).status_code == 401
    assert post(engine.address, "/inference/v1/generate", GENERATE).status_code == 200
    engine.check()


def test_the_token_is_on_no_command_line_and_in_no_log(engine: Engine) -> None:
    pids = [engine.pid, *descendants_of(engine.pid)]
    assert len(pids) >= 3  # guard, API server, EngineCore
    token = engine.address.token.encode()
    for pid in pids:
        assert token not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert token not in engine.log_path.read_bytes()
    assert engine.address.token not in repr(engine.address)


def test_a_failed_update_poisons_and_deaths_are_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first, second = start(RolloutConfig(num_engines=2, **SMALL), tiny_checkpoint, tmp_path)
    with first, second:
        for started in (first, second):
            started.wait_ready()
        # No shared memory was named before: the start fails inside the engine.
        assert post(first.address, "/start_weight_update").status_code == 500
        completion = {"model": str(tiny_checkpoint), "prompt": "1", "max_tokens": 1}
        for route, body in (("/inference/v1/generate", GENERATE), ("/v1/completions", completion)):
            refused = post(first.address, route, body)
            assert (refused.status_code, refused.json()["error"]["type"]) == (
                503,
                "weights_poisoned",
            )
            assert post(second.address, route, body).status_code == 200

        pids = descendants_of(first.pid)
        os.kill(api_server(first.pid), signal.SIGKILL)
        error = wait_for_death(first, 3.0)
        assert "ended by SIGKILL while serving" in str(error)
        assert "engine_0.log" in str(error)
        assert leftovers(pids, 10.0) == []

        pids = descendants_of(second.pid)
        find_engine_core(api_server(second.pid)).kill()
        message = str(wait_for_death(second, 3.0))
        assert "its EngineCore process died while serving" in message
        assert "\n" not in message
        assert leftovers(pids, 10.0) == []


RANK = """
import sys, time
from pathlib import Path
from megatron_rl.config import RolloutConfig
from megatron_rl.process.lifetime import die_with_parent
from megatron_rl.engine.server import start_engines
die_with_parent()
config = RolloutConfig(num_engines=int(sys.argv[3]), kv_cache_gib=0.1, max_num_seqs=8)
engines = start_engines(
    config, model_path=sys.argv[1], log_dir=Path(sys.argv[2]), token="t", seed=0,
    update_timeout_seconds=60.0,
)
if sys.argv[4] == "ready":
    for engine in engines:
        engine.wait_ready()
Path(sys.argv[2], "pids").write_text(" ".join(str(engine.pid) for engine in engines))
time.sleep(600)
"""


def start_rank(
    launcher: list[str], model_path: Path, folder: Path, num_engines: int, until: str
) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A rank that starts engines, below `launcher`; and the pids of the guards."""
    program = folder / "rank.py"
    program.write_text(RANK)
    command = [*launcher, str(program), str(model_path), str(folder), str(num_engines), until]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 150
    while not (folder / "pids").exists() or not (folder / "pids").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return process, [int(pid) for pid in (folder / "pids").read_text().split()]


@pytest.mark.slow  # e2e/test_signals.py kills a whole run's torchrun in the fast tests
def test_sigkill_of_torchrun_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"]
    process, [guard] = start_rank(torchrun, tiny_checkpoint, tmp_path, 1, "ready")
    pids = [guard, *descendants_of(guard)]
    assert find_engine_core(api_server(guard)).pid in pids
    process.kill()
    process.wait()
    assert leftovers(pids, 10.0) == []


def test_sigkill_while_engines_start_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of the rank alone, and of rank, guard and API server at once."""
    process, guards = start_rank([sys.executable], tiny_checkpoint, tmp_path, 2, "started")
    deadline = time.monotonic() + 60
    while not all(len(descendants_of(guard)) >= 4 for guard in guards):  # EngineCore is importing
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pids = [pid for guard in guards for pid in (guard, *descendants_of(guard))]
    process.kill()
    os.kill(guards[1], signal.SIGKILL)
    process.wait()
    assert leftovers(pids, 10.0) == []


def test_a_killed_guard_is_told_and_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    [engine] = start(RolloutConfig(**SMALL), tiny_checkpoint, tmp_path)
    with engine:
        deadline = time.monotonic() + 60
        while not (pids := descendants_of(engine.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(engine.pid, signal.SIGKILL)
        assert "its guard was ended by SIGKILL" in str(wait_for_death(engine, 3.0))
        assert leftovers(pids, 10.0) == []


def test_a_port_in_use_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=rf"rollout\.port: expected a free port, {port}"):
            start(RolloutConfig(port=port, **SMALL), tiny_checkpoint, tmp_path)


@contextmanager
def stranger(port: int = 0) -> Iterator[tuple[int, list[str | None]]]:
    """Somebody else's server that answers everything; its port, and the Authorization headers that
    it was sent.
    """
    seen: list[str | None] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, seen
        finally:
            server.shutdown()
            thread.join()


def test_a_stranger_on_the_port_never_sees_the_token(tiny_checkpoint: Path, tmp_path: Path) -> None:
    [engine] = start(RolloutConfig(**SMALL), tiny_checkpoint, tmp_path)
    with engine, stranger(httpx.URL(engine.address.url).port) as (_, seen):
        with pytest.raises(EngineError, match="somebody else's answers; choose another"):
            engine.wait_ready()
        assert seen and set(seen) == {None}


def test_a_listener_is_found_at_or_below_a_process() -> None:
    with stranger() as (port, _), subprocess.Popen(["sleep", "60"]) as child:
        try:
            assert listens(os.getpid(), port)
            assert not listens(os.getpid(), 1)
            assert listens(os.getppid(), port)  # its descendant listens
            assert not listens(child.pid, port)
            assert not listens(os.getpid() + 2**22, port)  # there is no such process
        finally:
            child.kill()


def test_given_servers_are_looked_at(engine: Engine) -> None:
    check_given([engine.address])
    wrong = EngineAddress(url=engine.address.url, token="another")
    with pytest.raises(EngineError, match=f"{engine.address.url} to take the token"):
        check_given([engine.address, wrong])
    with stranger() as (port, seen):
        open_to_all = EngineAddress(url=f"http://127.0.0.1:{port}", token="secret")
        with pytest.raises(EngineError, match=f"127.0.0.1:{port} to ask for a token"):
            check_given([open_to_all])
        assert set(seen) == {None}
    with pytest.raises(EngineError, match=f"ready at {open_to_all.url}, none answers"):
        check_given([open_to_all])


def test_servers_are_asked_whether_they_send_heads(engine: Engine) -> None:
    """It was started for heads of 24 tokens."""
    for number in (0, 1, 24):
        check_max_logprobs([engine.address], number)
    expected = (
        rf"num_logprobs=25: expected an engine at {engine.address.url} that sends 26 log-probs a "
        r"token, it refuses them; start it with --max-logprobs 26"
    )
    with pytest.raises(EngineError, match=expected):
        check_max_logprobs([engine.address], 25)
    with stranger() as (port, _):
        gone = EngineAddress(url=f"http://127.0.0.1:{port}", token="secret")
    check_max_logprobs([gone], 25)  # which others report


def test_a_bad_model_folder_gives_vllm_s_reason(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    [engine] = start(RolloutConfig(**SMALL), model, tmp_path)
    with engine, pytest.raises(EngineError) as caught:
        engine.wait_ready()
    first_line = str(caught.value).splitlines()[0]
    assert "exited with code 1 before it was ready" in first_line
    assert f"Invalid repository ID or local directory specified: '{model}'" in first_line


def test_a_truncated_checkpoint_gives_engine_core_s_reason(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    with open(model / "model.safetensors", "r+b") as weights:
        weights.truncate(9000)
    config = RolloutConfig(**SMALL)
    [engine] = start_engines(
        config,
        model_path=str(model),
        log_dir=tmp_path,
        token="t",
        seed=0,
        update_timeout_seconds=60.0,
        weight_backend=None,  # which reads the checkpoint too, and would say so first
    )
    with engine, pytest.raises(EngineError) as caught:
        engine.wait_ready()
    first_line = str(caught.value).splitlines()[0]
    assert re.search(r"exited with code 1 before it was ready: .*SafetensorError", first_line)


def test_a_start_that_takes_too_long_is_ended(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = RolloutConfig(startup_timeout_seconds=1.0, **SMALL)
    [engine] = start(config, tiny_checkpoint, tmp_path)
    pids = [engine.pid, *descendants_of(engine.pid)]
    with pytest.raises(EngineError, match=r"rollout\.startup_timeout_seconds=1"):
        engine.wait_ready()
    assert leftovers(pids, 5.0) == []


def test_given_servers_need_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RolloutConfig(num_engines=0, urls=["http://10.0.0.2:8000/"])
    monkeypatch.delenv("MEGATRON_RL_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="MEGATRON_RL_TOKEN"):
        given_addresses(config)
    monkeypatch.setenv("MEGATRON_RL_TOKEN", "t")
    assert given_addresses(config) == [EngineAddress(url="http://10.0.0.2:8000", token="t")]
