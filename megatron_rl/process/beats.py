"""Signs of life of a run's ranks: every rank leaves a file with where it is, again and again, so
that a rank that waits in vain for another one can say for which.

A rank that is stopped or hangs in an extension leaves no sign any more; one that was killed has no
process, and no last sign, which every other end leaves. The files are in the run's folder, which
all hosts share; ages are differences of the file system's own times.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.process.lifetime import register_cleanup, unregister_cleanup

FOLDER = "ranks"  # below run_dir
PERIOD_SECONDS = 2.0
MANY_RANKS = 64  # from here on the period grows, so that a file system sees as many writes a second
NUM_MISSED = 2  # signs that are missed before a rank counts as silent


class Beats:
    """This rank's signs, and a look at those of the others. A context manager.

    Args:
        run_dir: the run's folder.
        place: where this rank is, in a few words; called in a thread.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        num_ranks: int,
        place: Callable[[], str],
        period_seconds: float = PERIOD_SECONDS,
    ) -> None:
        self._folder, self._rank, self._num_ranks = run_dir / FOLDER, rank, num_ranks
        self._place = place
        self._period = period_seconds * max(1.0, num_ranks / MANY_RANKS)
        self._host = socket.gethostname()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="signs of life", daemon=True)

    def __enter__(self) -> Beats:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._leave()
        self._thread.start()
        register_cleanup(self._end)
        return self

    def __exit__(self, *_exception: object) -> None:
        unregister_cleanup(self._end)
        self._end()

    def killed(self) -> str:
        """The ranks of this host that have ended without a last sign, and where they were."""
        found = []
        for rank in range(self._num_ranks):
            with contextlib.suppress(OSError, ValueError):
                sign = json.loads(self._path(rank).read_text())
                is_here = sign["host"] == self._host
                if is_here and not sign.get("is_last") and not _is_running(sign["pid"]):
                    found.append(f"{_place_of(rank, sign)} has ended")
        return "; ".join(found)

    def others(self) -> str:
        """The ranks that have ended or given no sign of life for a while, and where they were; if
        all give signs, those that are somewhere else. "" if there is nothing to tell.
        """
        own = self._leave()
        silent, elsewhere = [], []
        for rank in range(self._num_ranks):
            if rank == self._rank:
                continue
            path = self._path(rank)
            try:
                age, sign = own - path.stat().st_mtime, json.loads(path.read_text())
            except (OSError, ValueError):
                silent.append(f"rank {rank} has left no sign of life")
                continue
            where = _place_of(rank, sign)
            if sign["host"] == self._host and not _is_running(sign["pid"]):
                silent.append(f"{where} has ended")
            elif age > NUM_MISSED * self._period:
                silent.append(f"{where} has given no sign of life for {age:.0f} s")
            elif sign["place"] != self._place():
                elsewhere.append(f"{where} is alive")
        return "; ".join(silent or elsewhere)

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.json"

    def _go_on(self) -> None:
        while not self._has_ended.wait(self._period):
            with contextlib.suppress(OSError):  # a full disk is told by what needs it
                self._leave()

    def _end(self) -> None:
        self._has_ended.set()
        with contextlib.suppress(OSError):
            self._leave(is_last=True)

    def _leave(self, *, is_last: bool = False) -> float:
        """Write this rank's file; its time."""
        path = self._path(self._rank)
        partial = path.with_suffix(f".{threading.get_ident()}")
        sign = {
            "pid": os.getpid(),
            "host": self._host,
            "place": self._place(),
            "is_last": is_last,
        }
        partial.write_text(json.dumps(sign))
        partial.replace(path)
        return path.stat().st_mtime


def _place_of(rank: int, sign: dict[str, Any]) -> str:
    return f"rank {rank} on {sign['host']} (process {sign['pid']}, last {sign['place']})"


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
