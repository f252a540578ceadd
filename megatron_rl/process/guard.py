"""`python -m megatron_rl.process.guard COMMAND ...`: run a server that cannot outlive the run.

In: a command, and as stdin a pipe whose other end the starting process holds. Out: the command's
output on the guard's own stdout and stderr, and its exit code: 128 + signal where a signal ended
it, 0 where the guard was told to end it, 1 where EngineCore died.

The guard kills everything below it when the pipe closes, when its parent changes (the pipe may
live on in forked children of a killed rank), on SIGTERM or SIGINT, when the command ends, or when
vLLM's EngineCore dies alone. It is a subreaper, so a grandchild cannot escape by losing its parent.
When the guard itself is killed, a shell that waits for nothing else kills its process group. No
torch, no vllm: it is up in 50 ms.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_rl.process.lifetime import become_subreaper, die_with_parent

POLL_SECONDS = 0.25
ENDING_SECONDS = 1.0  # a killed server's threads need to end, on a busy machine
GRACE_SECONDS = 2.0  # for the server to leave by itself, and take its shared memory along


def main(command: list[str]) -> int:
    become_subreaper()
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    parent = os.getppid()
    guard = os.getpid()
    stop_signals: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, frame: stop_signals.append(number))
    # What is left when the guard itself is killed: a shell that then reads the pipe's end.
    reader, _ = os.pipe()
    subprocess.Popen(["/bin/sh", "-c", "read line; kill -KILL 0"], stdin=reader)
    os.close(reader)
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"MEGATRON_RL_GUARDED": "1"},  # read by sync/engine_side/
        preexec_fn=lambda: die_with_parent(parent_pid=guard),  # one thread, so forking is safe
    )
    engine_pid = None
    while server.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
        if readable or os.getppid() != parent or stop_signals:
            end_descendants(server)
            return 0
        engine_pid = engine_pid or find_engine_core(server.pid)
        # EngineCore dies with a killed server too, whose many threads may take longer to end.
        if engine_pid is not None and not is_alive(engine_pid) and not ends_soon(server):
            # The server would notice, but only after seconds in which every request fails.
            print("guard: the EngineCore process died, ending its server", file=sys.stderr)
            server.kill()
            end_descendants(server)
            return 1
    end_descendants(server)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def ends_soon(server: subprocess.Popen[bytes]) -> bool:
    """True when the server has ended, or does so within ENDING_SECONDS."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(ENDING_SECONDS)
    return server.poll() is not None


def end_descendants(server: subprocess.Popen[bytes]) -> None:
    """Return when nothing is left below this process: SIGTERM to the server, then SIGKILL to
    whatever remains.
    """
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_SECONDS)
    # Orphans come to the subreaper, and with them what they start meanwhile: go on until there is
    # no child.
    while True:
        for pid in children_of(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.01)


def children_of(parent_pid: int) -> list[int]:
    """Direct children, from /proc."""
    return [pid for pid in all_pids() if status_of(pid)[1] == parent_pid]


def find_engine_core(server_pid: int) -> int | None:
    """vLLM's engine process below the server; it names itself (vllm/v1/engine/core.py) once it is
    up.
    """
    for pid in children_of(server_pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"VLLM::EngineCore"):
                return pid
    return None


def is_alive(pid: int) -> bool:
    """False for a zombie too."""
    return status_of(pid)[0] not in ("", "Z", "X")


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def status_of(pid: int) -> tuple[str, int]:
    """State letter and parent of a process; ("", -1) where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", -1
    state, parent = stat[stat.rindex(")") + 2 :].split()[:2]  # the name before may hold anything
    return state, int(parent)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
