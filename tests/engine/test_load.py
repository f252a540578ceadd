"""The load of engines from the text that vLLM 0.32 answers, of one that answers nothing, and of a
real one while it samples.
"""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from functools import partial

import httpx
import pytest

from megatron_rl.config import RolloutConfig, SamplingConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.http import authorization
from megatron_rl.engine.load import GAUGES, PREEMPTIONS, EngineLoad, parse
from megatron_rl.engine.pool import HttpEnginePool
from megatron_rl.engine.requests import GenerateRequest, Sampler
from megatron_rl.engine.server import Engine

TEXT = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:num_preemptions_total{engine="0",model_name="m"} %d
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
"""


def test_what_is_read() -> None:
    assert parse(TEXT % 7) == {
        "vllm:num_requests_running": 3.0,
        "vllm:num_requests_waiting": 2.0,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:num_preemptions_total": 7.0,
    }
    two = 'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 1.0\n'
    assert parse(two) == {"vllm:num_requests_running": 4.0}


@pytest.fixture
def url() -> Iterator[str]:
    """An engine whose preemptions grow by one with each reading."""
    count = iter(range(5, 10_000))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_allowed = self.headers["Authorization"] == "Bearer secret"
            body = (TEXT % next(count)).encode() if self.path == "/metrics" else b""
            self.send_response(200 if is_allowed else 401)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_figures_by_engine(url: str) -> None:
    dead = EngineAddress(url="http://127.0.0.1:9", token="secret")
    with EngineLoad([EngineAddress(url=url, token="secret"), dead], seconds=0.01) as load:
        figures: dict[str, float] = {}
        deadline = time.monotonic() + 10
        while figures.get("speed/engines/0/preemptions/sum", 0.0) < 1:
            figures = load.take()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert figures["speed/engines/0/running/mean"] == 3.0
    assert figures["speed/engines/0/waiting/max"] == 2.0
    assert figures["speed/engines/0/kv_cache_use/max"] == 0.25
    assert not any(key.startswith("speed/engines/1") for key in figures)


async def _generate(sampler: Sampler, request: GenerateRequest) -> None:
    await sampler.generate(request)


def test_the_load_of_a_real_engine(engine: Engine) -> None:
    """It runs at most 64 samples at a time (conftest.py), so that 32 of 96 wait."""
    assert httpx.get(f"{engine.address.url}/metrics").status_code == 401
    text = httpx.get(f"{engine.address.url}/metrics", headers=authorization(engine.address)).text
    assert parse(text).keys() == {*GAUGES, PREEMPTIONS}
    pool = HttpEnginePool([engine.address], RolloutConfig(), check=engine.check)
    requests = [
        GenerateRequest(
            token_ids=(1, 20, 14, 21, 32),
            num_samples=48,
            seed=key,
            sampling=SamplingConfig(max_tokens=64),
            key=key,
        )
        for key in range(2)
    ]
    with EngineLoad([engine.address], seconds=0.01) as load:
        pool.run([partial(_generate, request=request) for request in requests])
        busy = load.take()
        deadline = time.monotonic() + 10
        while (idle := load.take()).get("speed/engines/0/running/max") != 0.0:
            assert time.monotonic() < deadline, idle
            time.sleep(0.05)
    assert busy["speed/engines/0/running/max"] == 64.0
    assert 0.0 < busy["speed/engines/0/waiting/max"] <= 32.0
    assert 0.0 < busy["speed/engines/0/kv_cache_use/mean"] < 1.0
    assert busy["speed/engines/0/preemptions/sum"] == 0.0
    assert idle["speed/engines/0/waiting/max"] == 0.0
