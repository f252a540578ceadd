"""The owner's side of a process that answers questions, one line of JSON each, over a pipe of its
own: requests with a hard time limit.

`multiprocessing` and pools built on it (`concurrent.futures`, loky, pebble) are not used. A spawned
child would import the run's main module, and with it torch; a forked one would copy the locks of a
process with many threads; and if workers share a queue, a killed worker can leave it locked. Here
each worker has its own pipe, so that its death does not affect the others.

One signal to the process group ends the processes that a user's function started at once; a walk
over the process tree would miss children that are started in the meantime. The walk finds those
that left the group: the workers are subreapers, so that these remain their descendants.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from megatron_rl.errors import ConfigError
from megatron_rl.process.descendants import descendants
from megatron_rl.records import TOKEN_VARIABLE

STARTUP_TIMEOUT_SECONDS = 120.0  # for importing functions; the first read of a disk is slow


class WorkerTimeout(Exception):
    """The process did not answer within the time limit and was killed."""


class WorkerCrash(Exception):
    """The process ended instead of answering."""


class WorkerKilled(WorkerCrash):
    """The process was ended by SIGKILL, as by the kernel when memory runs out."""


class WorkerProcess:
    """A process. It must be started from a thread that lives as long as the process is needed,
    because the kernel ends the process together with that thread.

    Args:
        module: is run with this process's id and `arguments`. Its first line of output is
            `{"error": null}` once it is ready, or says why it is not.
        what: names the process in errors: "scoring process".
        key: the setting that names what the process imports.
    """

    def __init__(self, module: str, arguments: Sequence[str], *, what: str, key: str) -> None:
        self._what, self._key = what, key
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(os.getpid()), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # A separate process group: Ctrl-C reaches only the run, and killing the group also ends
            # the processes that it started.
            start_new_session=True,
            env={
                # It works on text that a model generated; it must not reach the engines.
                **{name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE},
                "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        self._is_ready = False

    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait until the process is ready.

        Raises:
            ConfigError: a function could not be imported, or the process did not start.
        """
        if self._is_ready:
            return
        try:
            error = self._exchange(b"", STARTUP_TIMEOUT_SECONDS)["error"]
        except (WorkerTimeout, WorkerCrash) as failure:
            error = f"{self._key}: expected a {self._what} that starts, got: {failure}"
        if error is not None:
            self.kill()
            raise ConfigError(error)
        self._is_ready = True

    def request(self, question: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """Sends one question and waits for its answer; both are described in `module`.

        Raises:
            WorkerTimeout, WorkerCrash: the process has ended; start another one.
        """
        return self._exchange(json.dumps(question).encode() + b"\n", timeout_seconds)

    def interrupt(self) -> None:
        """Kill the process and its descendants immediately; callable from any thread."""
        if self._process.poll() is None:
            started = descendants(self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            for pid in started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill the process like `interrupt`, reap it and close its pipes. May be called twice."""
        self.interrupt()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _exchange(self, outgoing: bytes, timeout_seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_seconds
        incoming = b""
        while not incoming.endswith(b"\n"):
            poller = select.poll()
            poller.register(self._answers, select.POLLIN)
            if outgoing:
                poller.register(self._requests, select.POLLOUT)
            ready = dict(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                self.kill()
                raise WorkerTimeout(f"no answer within {timeout_seconds:g} s")
            try:
                if self._requests in ready:
                    outgoing = outgoing[os.write(self._requests, outgoing) :]
                if self._answers in ready:
                    received = os.read(self._answers, 65536)
                    if not received:
                        raise BrokenPipeError
                    incoming += received
            except BrokenPipeError:
                self.kill()
                is_killed = self._process.returncode == -signal.SIGKILL
                kind = WorkerKilled if is_killed else WorkerCrash
                raise kind(self._how_it_ended()) from None
        return json.loads(incoming)

    def _how_it_ended(self) -> str:
        code = self._process.returncode
        if code >= 0:
            return f"the {self._what} exited with code {code}"
        return f"the {self._what} was killed by {signal.Signals(-code).name}"
