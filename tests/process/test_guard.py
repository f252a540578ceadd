"""The guard with small real processes below it; with vLLM below it: test_server.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import children_of, is_alive

# A server with a child in a session of its own, whose child in turn outlives its parent.
FAMILY = """
import os, subprocess, sys, time
pids = open(sys.argv[1], "w")
middle = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=2).pid)"
orphan = subprocess.check_output([sys.executable, "-c", middle], start_new_session=True)
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(os.getpid(), child.pid, int(orphan), file=pids, flush=True)
os.rename(sys.argv[1], sys.argv[2])
time.sleep(60)
"""


@pytest.fixture
def family(tmp_path: Path):
    """A guard, and the pids of the three processes below it."""
    guard = start_guard(sys.executable, "-c", FAMILY, str(tmp_path / "new"), str(tmp_path / "pids"))
    deadline = time.monotonic() + 20
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3 and all(is_alive(pid) for pid in pids)
    yield guard, pids
    for pid in (guard.pid, *pids):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def start_guard(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_rl.process.guard", *command], stdin=subprocess.PIPE
    )


def test_closing_the_pipe_ends_all(family) -> None:
    guard, pids = family
    guard.stdin.close()
    assert guard.wait(5) == 0
    assert not any(is_alive(pid) for pid in pids)


def test_sigterm_ends_all(family) -> None:
    guard, pids = family
    guard.terminate()
    assert guard.wait(5) == 0
    assert not any(is_alive(pid) for pid in pids)


def test_the_server_s_end_ends_the_rest_and_is_passed_on(family) -> None:
    guard, pids = family
    os.kill(pids[0], signal.SIGKILL)
    assert guard.wait(5) == 128 + signal.SIGKILL
    assert not any(is_alive(pid) for pid in pids)


def test_a_killed_guard_takes_its_process_group_along(tmp_path: Path) -> None:
    """The server, and what the server started, as vLLM does, in the same group."""
    note = tmp_path / "pid"
    program = (
        "import subprocess, sys, time\n"
        "open(sys.argv[1], 'w').write(str(subprocess.Popen(['sleep', '60']).pid))\n"
        "time.sleep(60)"
    )
    guard = start_guard(sys.executable, "-c", program, str(note))
    deadline = time.monotonic() + 10
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [*children_of(guard.pid), int(note.read_text())]
    assert len(pids) == 3 and all(is_alive(pid) for pid in pids)
    guard.kill()
    guard.wait()
    deadline = time.monotonic() + 2
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_alive(pid) for pid in pids)


def test_a_parent_that_dies_while_the_pipe_lives_on(tmp_path: Path) -> None:
    """As when a forked child of the rank holds the pipe's other end."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys, time\n"
            "command = [sys.executable, '-m', 'megatron_rl.process.guard', 'sleep', '60']\n"
            "guard = subprocess.Popen(command, stdin=subprocess.PIPE)\n"
            "holder = os.fork()\n"
            "if holder: print(guard.pid, holder, flush=True)\n"
            "time.sleep(60)\n",
        ],
        stdout=subprocess.PIPE,
    )
    guard_pid, holder_pid = map(int, parent.stdout.readline().split())
    time.sleep(0.5)  # the guard is up
    parent.kill()
    parent.wait()
    try:
        deadline = time.monotonic() + 5
        while is_alive(guard_pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert is_alive(holder_pid)
        assert not is_alive(guard_pid)
    finally:
        os.kill(holder_pid, signal.SIGKILL)


def test_exit_code_is_passed_on() -> None:
    assert start_guard(sys.executable, "-c", "raise SystemExit(7)").wait(10) == 7


def test_the_guard_is_light() -> None:
    program = "import sys, megatron_rl.process.guard; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program]) == b"False\n"
