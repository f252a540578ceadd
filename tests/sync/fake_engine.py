"""An engine without vLLM and HTTP: what `EngineControl` offers, on real UpdateReceivers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.receive import UpdateReceiver
from megatron_rl.sync.wire import TensorSpec


class FakeEngine:
    """Its model is a dictionary per worker, loaded in place as vLLM's is."""

    def __init__(self, url: str, expected: dict[str, TensorSpec], num_workers: int = 1) -> None:
        self.url = url
        self.calls: list[str] = []
        self.version = 0
        self.models: list[dict[str, torch.Tensor]] = [{} for _ in range(num_workers)]
        self.workers = [
            UpdateReceiver(expected, worker=worker, device=torch.device("cpu"))
            for worker in range(num_workers)
        ]

    def world_size(self) -> int:
        return len(self.workers)

    def initialize(self, values: dict[str, Any]) -> None:
        self.calls.append("initialize")
        self._on_all(lambda worker, _: worker.connect(**json.loads(json.dumps(values))))

    def is_paused(self) -> bool:
        return False

    def pause(
        self, *, mode: str = "wait", drain_seconds: float = 0.0, silence_seconds: float = math.inf
    ) -> None:
        self.calls.append("pause" if mode == "wait" else f"pause {mode}")

    def start(self) -> None:
        self.calls.append("start")
        for worker in self.workers:
            worker.start()

    def update(self, phase: str, values: dict[str, Any]) -> None:
        self.calls.append(phase.partition(" ")[0])
        body = {"manifest": None, "bucket": None, "abandon": None} | json.loads(json.dumps(values))
        self._on_all(lambda worker, model: worker.update(**body, load=model.update))

    def _on_all(self, call: Callable[[UpdateReceiver, dict[str, torch.Tensor]], None]) -> None:
        """All workers at the same time, since they may wait for each other."""
        with ThreadPoolExecutor(len(self.workers)) as pool:
            list(pool.map(call, self.workers, self.models))

    def abandon(self, reason: str) -> None:
        self.calls.append(f"abandon: {reason}")
        for worker in self.workers:
            try:
                worker.update(manifest=None, bucket=None, abandon=reason, load=dict)
            except SyncError:
                continue

    def finish(self, version: int) -> None:
        self.calls.append("finish")
        for worker in self.workers:
            worker.check_complete()
            worker.complete()
        self.version = version

    def reset_prefix_cache(self, *, with_running: bool = False) -> None:
        self.calls.append("reset all" if with_running else "reset")

    def resume(self) -> None:
        self.calls.append("resume")

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
