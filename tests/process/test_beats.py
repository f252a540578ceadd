"""Signs of life of ranks, without ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_rl.process.beats import FOLDER, Beats

PERIOD = 0.05


def beats(folder: Path, rank: int, place: str = "in step 3, phase learner") -> Beats:
    return Beats(folder, rank=rank, num_ranks=3, place=lambda: place, period_seconds=PERIOD)


def sign(folder: Path, rank: int, *, pid: int, age: float = 0.0, place: str = "") -> None:
    path = folder / FOLDER / f"rank_{rank}.json"
    place = place or "in step 3, phase learner"
    path.write_text(json.dumps({"pid": pid, "host": os.uname().nodename, "place": place}))
    then = time.time() - age
    os.utime(path, (then, then))


def test_who_is_missed_and_where_it_was(tmp_path: Path) -> None:
    own = beats(tmp_path, 0)
    with own:
        assert own.others() == "rank 1 has left no sign of life; rank 2 has left no sign of life"
        with subprocess.Popen(["true"]) as ended:
            ended.wait()
        sign(tmp_path, 1, pid=ended.pid)
        sign(tmp_path, 2, pid=os.getpid(), age=62.0, place="in step 2, phase sync")
        host = os.uname().nodename
        assert own.others() == (
            f"rank 1 on {host} (process {ended.pid}, last in step 3, phase learner) has ended; "
            f"rank 2 on {host} (process {os.getpid()}, last in step 2, phase sync) has given no "
            "sign of life for 62 s"
        )


def test_if_all_live_those_that_are_elsewhere_are_told(tmp_path: Path) -> None:
    with beats(tmp_path, 0) as own, beats(tmp_path, 1), beats(tmp_path, 2, "in step 3, phase save"):
        time.sleep(6 * PERIOD)  # their threads go on
        assert own.others().startswith("rank 2 on ")
        assert own.others().endswith("last in step 3, phase save) is alive")
    names = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert names == [f"rank_{rank}.json" for rank in range(3)]  # nothing is left behind


def test_a_rank_that_was_killed_is_told_from_one_that_ended(tmp_path: Path) -> None:
    """Rank 1 was killed; rank 2 has ended by itself, or by a signal, which runs the cleanups."""
    script = """
import os, signal, sys
from pathlib import Path
from megatron_rl.process.beats import Beats
from megatron_rl.process.lifetime import run_cleanups

rank, ending = int(sys.argv[2]), sys.argv[3]
with Beats(Path(sys.argv[1]), rank=rank, num_ranks=3, place=lambda: "in step 3, phase learner"):
    if ending == "signal":
        run_cleanups()
        os._exit(143)
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""

    def end(rank: int, ending: str) -> int:
        command = [sys.executable, "-c", script, str(tmp_path), str(rank), ending]
        with subprocess.Popen(command) as process:
            process.wait()
        return process.pid

    with beats(tmp_path, 0) as own:
        assert own.killed() == ""
        for ending in ("by itself", "signal"):
            end(2, ending)
            assert own.killed() == "" and "has ended" in own.others()
        killed = end(1, "kill")
        place = f"(process {killed}, last in step 3, phase learner)"
        assert own.killed() == f"rank 1 on {os.uname().nodename} {place} has ended"


def test_a_single_rank_misses_nobody(tmp_path: Path) -> None:
    with Beats(tmp_path, rank=0, num_ranks=1, place=lambda: "") as own:
        assert own.others() == ""
