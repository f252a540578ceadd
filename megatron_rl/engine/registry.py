"""Engines that other processes start for a run, and how the run finds them: by a file each, in a
folder of its `run_dir` on a file system that all hosts share.

`python -m megatron_rl.serve` writes the file when its engine is ready, and deletes it at its end.
A file that a killed process left names an engine that does not answer.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.http import ReadinessProbe
from megatron_rl.errors import EngineError

FOLDER = "engines"  # in run_dir
LOOK_SECONDS = 0.5
ANSWER_SECONDS = 5.0  # of a registered engine, for one request
SILENT_SECONDS = 40.0  # after which a registered engine that does not answer is an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """One engine. Example: `Registration(url="http://10.0.0.3:40001", host="node3", pid=4711,
    place="GPU 0+1")`.
    """

    url: str
    host: str
    pid: int
    place: str


def register(run_dir: Path, url: str, place: str) -> Path:
    """Write the file of an engine that is ready; returns its path."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    parts = urlsplit(url)
    path = folder / f"{parts.hostname}_{parts.port}.json"
    entry = Registration(url=url, host=socket.gethostname(), pid=os.getpid(), place=place)
    hidden = folder / f".{path.name}.{secrets.token_hex(4)}"
    hidden.write_text(json.dumps(asdict(entry)) + "\n")
    hidden.rename(path)  # never half a file
    return path


def registrations(run_dir: Path) -> list[Registration]:
    """All engines with a file, in the order of their URLs.

    Raises:
        EngineError: a file is not what `register` writes.
    """
    found = []
    for path in sorted((run_dir / FOLDER).glob("[!.]*.json")):
        try:
            found.append(Registration(**json.loads(path.read_text())))
        except FileNotFoundError:
            continue  # it ended just now
        except (ValueError, TypeError) as error:
            raise EngineError(f"{path}: expected the file of an engine, {error}; delete it") from (
                error
            )
    return found


def wait_for_registered(
    run_dir: Path,
    count: int,
    token: str,
    timeout_seconds: float,
    say: Callable[[str], None],
) -> list[EngineAddress]:
    """The first `count` registered engines that take the token.

    Args:
        timeout_seconds: for all of them to load (rollout.startup_timeout_seconds).
        say: is told when it begins to wait.

    Raises:
        EngineError: there are fewer within the time, or a registered one does not answer for
            SILENT_SECONDS.
    """
    begin = time.monotonic()
    silent_since: dict[Registration, float] = {}
    has_told = False
    while True:
        answering = []
        for entry in registrations(run_dir):
            address = EngineAddress(
                url=entry.url, token=token, place=f"{entry.host}, {entry.place}".rstrip(", ")
            )
            with ReadinessProbe(address, ANSWER_SECONDS) as probe:
                if probe.is_up() and probe.accepts_token():
                    answering.append(address)
                    silent_since.pop(entry, None)
                else:
                    silent_since.setdefault(entry, time.monotonic())
        if len(answering) >= count:
            return answering[:count]
        for entry, since in silent_since.items():
            if time.monotonic() - since > SILENT_SECONDS:
                raise EngineError(
                    f"{run_dir / FOLDER}: expected the engine at {entry.url} (host {entry.host}, "
                    f"process {entry.pid}) to answer with the run's token within "
                    f"{SILENT_SECONDS:g} s, it does not; delete its file if it has ended"
                )
        if time.monotonic() - begin > timeout_seconds:
            raise EngineError(
                f"rollout.placement=nodes: expected {count} engines (rollout.num_engines) in "
                f"{run_dir / FOLDER} within rollout.startup_timeout_seconds={timeout_seconds:g}, "
                f"got {len(answering)}; start them with python -m megatron_rl.serve and this "
                "run_dir"
            )
        if not has_told:
            say(f"waiting for {count} engines in {run_dir / FOLDER}, {len(answering)} are there")
            has_told = True
        time.sleep(LOOK_SECONDS)
