"""An engine that a run has started, without a process."""

from __future__ import annotations

from megatron_rl.engine.address import EngineAddress


class FakeEngine:
    """Logs what is asked of it."""

    address = EngineAddress(url="http://127.0.0.1:1", token="secret")

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def wait_ready(self) -> None:
        self._log.append("ready")

    def check(self) -> None:
        self._log.append("check")

    def stop(self) -> None:
        self._log.append("stop")
