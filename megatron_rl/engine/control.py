"""The weight routes of one vLLM server, each call with a timeout and an answer that is looked at.

Bodies and answers are those of vllm/entrypoints/rl/online/api_router.py and
vllm/entrypoints/serve/dev/cache/api_router.py (vLLM 0.32), behind the run's bearer token.
"""

from __future__ import annotations

from typing import Any

import httpx

from megatron_rl.errors import SyncError
from megatron_rl.records import EngineAddress

MAX_REASON_CHARACTERS = 600  # of an engine's answer, in our own error
ABANDON_SECONDS = 5.0  # an error is already on its way to the user


class EngineControl:
    """Blocking client of one engine; safe to use from the one thread that serves this engine.

    Every method raises SyncError naming the engine, the phase, and what it answered.
    """

    def __init__(self, address: EngineAddress, timeout_seconds: float) -> None:
        self.url = address.url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {address.token}"},
            timeout=timeout_seconds,
            # uvicorn closes a connection after a failed call; the next one must not meet that
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,  # a proxy from the environment must not see weights or token
        )

    def close(self) -> None:
        self._client.close()

    def world_size(self) -> int:
        """Workers of the engine, over tensor, pipeline and data parallelism."""
        return int(self._call("connect", "GET", "/get_world_size")["world_size"])

    def initialize(self, values: dict[str, Any]) -> None:
        self._call("connect", "POST", "/init_weight_transfer_engine", {"init_info": values})

    def is_paused(self) -> bool:
        return bool(self._call("pause", "GET", "/is_paused")["is_paused"])

    def pause(self) -> None:
        """Return when every request in flight is answered; new ones wait in the engine."""
        self._call("pause", "POST", "/pause?mode=wait&clear_cache=true")

    def start(self) -> None:
        self._call("start", "POST", "/start_weight_update")

    def update(self, phase: str, values: dict[str, Any]) -> None:
        self._call(phase, "POST", "/update_weights", {"update_info": values})

    def abandon(self, reason: str) -> None:
        """End an update that will not be finished; the engine answers with the failure it is."""
        try:
            self._client.post(
                "/update_weights",
                json={"update_info": {"abandon": reason}},
                timeout=min(self._timeout_seconds, ABANDON_SECONDS),
            )
        except httpx.HTTPError:
            return  # it is gone, or hangs: what was to be said to it is moot

    def finish(self, version: int) -> None:
        self._call("finish", "POST", "/finish_weight_update", {"weight_version": str(version)})

    def reset_prefix_cache(self) -> None:
        answer = self._call("reset prefix cache", "POST", "/reset_prefix_cache")
        if answer.get("success") is not True:
            raise SyncError(
                f"engine {self.url}, reset prefix cache: expected success, got {answer}; "
                "blocks computed with the old weights are still held"
            )

    def resume(self) -> None:
        self._call("resume", "POST", "/resume")

    def _call(
        self, phase: str, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise SyncError(
                f"engine {self.url}, {phase}: expected an answer within {self._timeout_seconds} s, "
                f"got none ({type(error).__name__}); change sync.timeout_seconds"
            ) from error
        except httpx.HTTPError as error:
            raise SyncError(
                f"engine {self.url}, {phase}: expected an answer, got {error!r}"
            ) from error
        if response.status_code != httpx.codes.OK:
            raise SyncError(
                f"engine {self.url}, {phase}: expected status 200, got {response.status_code}: "
                f"{response.text[:MAX_REASON_CHARACTERS]}"
            )
        return response.json()
