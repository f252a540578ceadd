"""Ends the processes of a run: children together with their parent, ranks at once on a signal.

Linux only, and without torch or vllm, so that every process can import it. A learner rank can block
in C++ for minutes, inside a gloo collective, during which Python's signal handlers do not run.
Therefore the C handler writes the signal to a pipe (`signal.set_wakeup_fd`), and a thread that
reads the pipe ends the process.

psutil cannot be used here: it supports neither prctl's parent-death signal and subreaper, nor
signal handling.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLEANUP_SECONDS = 5.0  # for all cleanups together, after a signal

_ending = threading.Event()  # set when a signal is about to end this process
_libc = ctypes.CDLL(None, use_errno=True)
_cleanups: list[Callable[[], None]] = []


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {value}): {os.strerror(code)}")


def die_with_parent(signum: int = signal.SIGKILL, *, parent_pid: int | None = None) -> None:
    """Have the kernel send `signum` to this process when its parent ends.

    To the kernel the parent is the *thread* that forked, so start such children from a thread that
    lives as long as its process.

    Args:
        parent_pid: the expected parent; if the parent is another process by now, it has already
            ended, and `signum` is sent at once. None: the parent that `multiprocessing` knows, or
            the current parent in a process that it did not start.
    Raises:
        OSError: the kernel refused.
    """
    if parent_pid is None:
        process = multiprocessing.parent_process()
        parent_pid = os.getppid() if process is None else process.pid
    _prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signum)


def bind_forked_children() -> None:
    """Make every child that is forked from now on end with this process, and on a signal.

    This is for children that libraries fork, such as Megatron's checkpoint writers
    (megatron/core/dist_checkpointing/strategies/filesystem_async.py). Otherwise they would survive
    a killed rank, and inherit the handlers and the pipe of `watch_signals` without its thread.
    """
    before_fork = threading.local()  # process id and signal mask of the thread that forks

    def block_signals() -> None:
        # If a signal reached the child before `bind_child`, the inherited handler would write it to
        # the parent's pipe. While blocked, it stays pending in the child.
        before_fork.pid = os.getpid()
        before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING_SIGNALS)

    def restore_signals() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before_fork.mask)

    def bind_child() -> None:
        signal.set_wakeup_fd(-1)
        for signum in _ENDING_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        restore_signals()
        die_with_parent(parent_pid=before_fork.pid)

    os.register_at_fork(
        before=block_signals, after_in_parent=restore_signals, after_in_child=bind_child
    )


def become_subreaper() -> None:
    """Become the parent of orphaned descendants, in place of init, so they can be found and ended.

    Raises:
        OSError: the kernel refused.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def register_cleanup(cleanup: Callable[[], None]) -> None:
    """Run `cleanup` when a signal ends this process (see `watch_signals`).

    Cleanups run in reverse order of registration.
    """
    _cleanups.append(cleanup)


def unregister_cleanup(cleanup: Callable[[], None]) -> None:
    """Remove a registered cleanup; one that is not registered is ignored."""
    with contextlib.suppress(ValueError):
        _cleanups.remove(cleanup)


def watch_signals(describe: Callable[[], str] | None) -> None:
    """Make SIGINT and SIGTERM end this process at once, even if its main thread blocks in C++.

    On a signal the line `stopped by SIGTERM: <describe()>` is written to stderr, the registered
    cleanups get CLEANUP_SECONDS in total, and the process exits with 128 + signal. Call it once,
    from the main thread.

    Args:
        describe: says where the run is; called in the watching thread. None, or an empty text that
            it returns: no line is written.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for signum in _ENDING_SIGNALS:
        # The byte is only written for signals that have a Python handler.
        signal.signal(signum, _leave_to_the_watcher)
    threading.Thread(
        target=_end_on_signal, args=(reader, describe), name="signal-watcher", daemon=True
    ).start()


def is_ending() -> bool:
    """Whether a signal is ending this process, so that nothing new should be started."""
    return _ending.is_set()


def _leave_to_the_watcher(signum: int, frame: object) -> None:
    pass


def _end_on_signal(reader: int, describe: Callable[[], str] | None) -> None:
    for signum in _signals(reader):
        if signum not in _ENDING_SIGNALS:
            continue  # a signal with another handler, which writes to the same pipe
        try:
            _ending.set()
            if place := describe() if describe is not None else "":
                _say(f"stopped by {signal.Signals(signum).name}: {place}")
            worker = threading.Thread(target=run_cleanups, name="cleanup", daemon=True)
            worker.start()
            worker.join(CLEANUP_SECONDS)
        finally:
            os._exit(128 + signum)


def _signals(reader: int) -> Iterator[int]:
    while received := os.read(reader, 64):
        yield from received


def run_cleanups() -> None:
    """Run the registered cleanups, the last one first, just before the process ends.

    A cleanup that fails is reported on stderr. This is a process boundary: any `Exception` is
    caught, because the other cleanups must still run.
    """
    for cleanup in reversed(tuple(_cleanups)):  # a copy: other threads may change the list
        try:
            cleanup()
        except Exception as error:
            _say(f"cleanup {cleanup!r} failed: {error!r}")


def _say(line: str) -> None:
    # Not through sys.stderr: the main thread may hold its lock.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, (line + "\n").encode())
