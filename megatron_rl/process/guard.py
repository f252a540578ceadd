"""`python -m megatron_rl.process.guard COMMAND ...`: runs a server that cannot outlive the run.

The guard's stdin is a pipe whose other end is held by the process that started the guard. The
command's output is written to the guard's stdout and stderr. The guard exits with the command's
exit code, with 128 + signal if a signal ended the command, with 0 if the guard was told to end it,
and with 1 if EngineCore died.

The guard kills all its descendants when the pipe is closed, when its parent changes (forked
children of a killed rank may hold the pipe open), on SIGTERM or SIGINT, when the command ends, or
when vLLM's EngineCore process dies while its server lives on. The guard is a subreaper: descendants
whose parent dies become its children, so none can escape. If the guard itself is killed, a shell
that waits for this event kills the guard's process group.

The guard must start fast, so it imports neither torch nor vllm. psutil adds about 10 ms; unlike
code that reads /proc directly, it distinguishes a process from a later one with the same id.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

import psutil

from megatron_rl.process.lifetime import become_subreaper, die_with_parent

POLL_SECONDS = 0.25
ENDING_SECONDS = 1.0  # for the threads of a killed server to end, on a busy machine
GRACE_SECONDS = 2.0  # for the server to end by itself and remove its shared memory
# In which a guard has seen the death of EngineCore and has ended too, on a busy machine. Requests
# and updates fail earlier.
DEATH_SECONDS = POLL_SECONDS + ENDING_SECONDS + 1.0
ENGINE_CORE = "VLLM::EngineCore"  # the name that the process gives itself (vllm/v1/engine/core.py)


def main(command: list[str]) -> int:
    """Run the command until it or the guard ends; returns the exit code of the guard."""
    become_subreaper()
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    parent = os.getppid()
    guard = os.getpid()
    stop_signals: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, frame: stop_signals.append(number))
    # This shell outlives a guard that is killed: it then reads the end of the pipe and kills the
    # process group.
    reader, _ = os.pipe()
    subprocess.Popen(["/bin/sh", "-c", "read line; kill -KILL 0"], stdin=reader)
    os.close(reader)
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"MEGATRON_RL_GUARDED": "1"},  # read by sync/engine_side/
        # Forking is safe here: the guard has one thread.
        preexec_fn=lambda: die_with_parent(parent_pid=guard),
    )
    engine_core = None
    while server.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
        if readable or os.getppid() != parent or stop_signals:
            end_descendants(server)
            return 0
        engine_core = engine_core or find_engine_core(server.pid)
        # EngineCore also dies when the server is killed; the server's threads may end later.
        if engine_core is not None and not is_alive(engine_core) and not ends_soon(server):
            # The server would notice, but only after seconds in which every request fails.
            print("guard: the EngineCore process died, ending its server", file=sys.stderr)
            server.kill()
            end_descendants(server)
            return 1
    end_descendants(server)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def ends_soon(server: subprocess.Popen[bytes]) -> bool:
    """Whether the server has ended, or does so within ENDING_SECONDS."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(ENDING_SECONDS)
    return server.poll() is not None


def end_descendants(server: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the server, then SIGKILL to every descendant that is left after
    GRACE_SECONDS; returns when none is left.
    """
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_SECONDS)
    # Orphans become children of the subreaper, and so do processes that they start in the
    # meantime. Therefore this is repeated until there is no child.
    guard = psutil.Process()
    while True:
        for child in guard.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.01)


def find_engine_core(server_pid: int) -> psutil.Process | None:
    """vLLM's engine process under the server; None until it has started and set its own name."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(server_pid).children():
            # A child may end between the two calls, and an ended one has no command line.
            with contextlib.suppress(psutil.NoSuchProcess):
                if "".join(child.cmdline()).startswith(ENGINE_CORE):
                    return child
    return None


def is_alive(process: psutil.Process) -> bool:
    """Whether the process is running; a zombie (ended, but not waited for) is not."""
    try:
        return process.is_running() and process.status() not in (
            psutil.STATUS_ZOMBIE,
            psutil.STATUS_DEAD,
        )
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
