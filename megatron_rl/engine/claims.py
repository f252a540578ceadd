"""A run's claim on an engine that it did not start, so that no second run publishes weights to it.

The claim is held at the engine, by its gate. `Claim` is that side: a claim ends when it is given
back, or if its run does not renew it for CLAIM_SECONDS, as after SIGKILL or a cut cable. `Claims`
is the run's side: it takes the claims of all engines, and renews them in a thread.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.http import client_settings, reason_of
from megatron_rl.errors import EngineError

CLAIM_ROUTE = "/megatron_rl/claim"
RELEASE_ROUTE = "/megatron_rl/release"
CLAIM_SECONDS = 12.0
RENEW_SECONDS = 3.0
CALL_SECONDS = 10.0  # for one request
RENEW_CALL_SECONDS = 2.0  # short, because a frozen engine must not keep others from being renewed
RELEASE_SECONDS = 1.0  # short, because a run that ends may not be able to reach its engines
LOOK_SECONDS = 1.0  # between attempts to claim an engine that another run holds


class Claim:
    """Who has claimed an engine. Times are in monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._run = ""
        self._holder = ""
        self._renewed = 0.0

    def take(self, run: str, holder: str) -> tuple[str, float] | None:
        """Take or renew the claim for a run. Returns None, or if another run holds it, a
        description of that run and the seconds since it renewed its claim.
        """
        age = self._clock() - self._renewed
        if self._run not in ("", run) and age < CLAIM_SECONDS:
            return self._holder, age
        self._run, self._holder, self._renewed = run, holder, self._clock()
        return None

    def release(self, run: str) -> None:
        """Give the claim back; ignored if another run holds it."""
        if self._run == run:
            self._run = ""


class Claims:
    """The claims of a run on all given engines. A context manager.

    Args:
        run_dir: of the run. A run that is started again in it takes its own claims at once.

    Raises:
        EngineError: another run holds one of the engines, or one does not answer.
    """

    def __init__(self, addresses: Sequence[EngineAddress], run_dir: Path) -> None:
        host = socket.gethostname()
        self._body = {
            "run": f"{host}:{run_dir.resolve()}",
            "holder": f"the run in {run_dir.resolve()} on {host}, process {os.getpid()}",
        }
        self._clients = [
            httpx.Client(**client_settings(address), timeout=CALL_SECONDS) for address in addresses
        ]
        self._lost = ""
        self._is_ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claims", daemon=True)
        try:
            for client in self._clients:
                self._take(client)
        except BaseException:
            self.release()
            raise
        self._thread.start()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()

    def check(self) -> None:
        """Raise EngineError if another run has taken an engine, because this one was stopped."""
        if self._lost:
            raise EngineError(self._lost)

    def release(self) -> None:
        """Give all claims back. May be called twice."""
        if self._is_ended.is_set():
            return
        self._is_ended.set()
        for client in self._clients:
            try:
                client.post(RELEASE_ROUTE, json=self._body, timeout=RELEASE_SECONDS)
            except httpx.HTTPError:
                continue  # it is gone, or the claim ends by itself

    def _take(self, client: httpx.Client) -> None:
        """Claim one engine; wait for a claim whose run does not renew it any more."""
        last_age = float("inf")
        while True:
            try:
                response = client.post(CLAIM_ROUTE, json=self._body)
            except httpx.HTTPError as error:
                raise EngineError(
                    f"engine {client.base_url}: expected an answer to the claim of this run, got "
                    f"{error!r}"
                ) from error
            if response.status_code == httpx.codes.OK:
                return
            if response.status_code != httpx.codes.CONFLICT:
                raise EngineError(
                    f"engine {client.base_url}: expected to claim it, got {reason_of(response)}"
                )
            error = response.json()["error"]
            if error["age"] < last_age and last_age < float("inf"):
                raise EngineError(
                    f"engine {client.base_url}: expected an engine that no other run uses, it is "
                    f"claimed by {error['message']}; give each run engines of its own"
                )
            last_age = error["age"]
            time.sleep(LOOK_SECONDS)

    def _renew(self) -> None:
        while not self._is_ended.wait(RENEW_SECONDS):
            for client in self._clients:
                try:
                    response = client.post(CLAIM_ROUTE, json=self._body, timeout=RENEW_CALL_SECONDS)
                except httpx.HTTPError:
                    continue  # a dead engine is told by whoever needs it
                if response.status_code == httpx.codes.CONFLICT:
                    self._lost = (
                        f"engine {client.base_url}: expected the claim of this run, it did not "
                        f"renew it in time, and {response.json()['error']['message']} has it now"
                    )
