"""How busy the engines are, from their own `/metrics` (Prometheus text of vLLM 0.32:
vllm/v1/metrics/loggers.py), read once a second by a thread beside the run.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence

import httpx

from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.http import authorization, tls_context

SECONDS = 1.0  # between two readings
TIMEOUT_SECONDS = 2.0
GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_use",  # a share, 0 to 1
}
PREEMPTIONS = "vllm:num_preemptions_total"
LINE = re.compile(r"^(vllm:\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


def parse(text: str) -> dict[str, float]:
    """The values of GAUGES and PREEMPTIONS by name, each added up over its labels."""
    values: dict[str, float] = {}
    for name, value in LINE.findall(text):
        if name in GAUGES or name == PREEMPTIONS:
            values[name] = values.get(name, 0.0) + float(value)
    return values


class EngineLoad:
    """Reads the engines' metrics until it is closed; a context manager. An engine that does not
    answer is left out: the requests of the run say what is wrong with it.
    """

    def __init__(self, addresses: Sequence[EngineAddress], *, seconds: float = SECONDS) -> None:
        self._addresses = tuple(addresses)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._readings: list[list[dict[str, float]]] = [[] for _ in addresses]
        self._preemptions: dict[int, float] = {}  # of each engine at the last `take`
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine-load", daemon=True)

    def __enter__(self) -> EngineLoad:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._has_ended.set()
        self._thread.join()

    def take(self) -> dict[str, float]:
        """Means and maxima since the last call, by engine: `speed/engines/0/waiting/max`."""
        with self._lock:
            readings, self._readings = self._readings, [[] for _ in self._addresses]
        figures: dict[str, float] = {}
        for index, of_engine in enumerate(readings):
            for name, short in GAUGES.items():
                values = [reading[name] for reading in of_engine if name in reading]
                if values:
                    figures[f"speed/engines/{index}/{short}/mean"] = sum(values) / len(values)
                    figures[f"speed/engines/{index}/{short}/max"] = max(values)
            counts = [reading[PREEMPTIONS] for reading in of_engine if PREEMPTIONS in reading]
            if counts:
                before = self._preemptions.get(index, counts[0])
                figures[f"speed/engines/{index}/preemptions/sum"] = counts[-1] - before
                self._preemptions[index] = counts[-1]
        return figures

    def _watch(self) -> None:
        with httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False, verify=tls_context()) as client:
            while not self._has_ended.wait(self._seconds):
                for index, address in enumerate(self._addresses):
                    try:
                        answer = client.get(
                            f"{address.url}/metrics", headers=authorization(address)
                        )
                    except httpx.HTTPError:
                        continue
                    if answer.status_code == httpx.codes.OK:
                        with self._lock:
                            self._readings[index].append(parse(answer.text))
