"""How processes of a run end: children with their parent, ranks at once on a signal. Linux only.

A leaf: no torch, no vllm. A learner rank blocks in C++ for minutes inside a gloo collective,
where Python's signal handlers do not run; so signals are read by a thread of their own
(`signal.set_wakeup_fd` is written by the C handler), which ends the process.
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

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLEANUP_SECONDS = 5.0  # all cleanups together, after a signal

_ending = threading.Event()  # a signal has come that ends this process
_libc = ctypes.CDLL(None, use_errno=True)
_cleanups: list[Callable[[], None]] = []


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {value}): {os.strerror(code)}")


def die_with_parent(signum: int = signal.SIGKILL, *, parent_pid: int | None = None) -> None:
    """Have the kernel send `signum` to this process when its parent ends.

    `parent_pid` is who the parent should be: known to a forked child, and to a child of
    `multiprocessing`, which is the default; else whoever is the parent now. A parent that was
    gone before the call is noticed too. The kernel means the *thread* that forked: start such
    children from a thread that lives as long as its process.
    """
    if parent_pid is None:
        process = multiprocessing.parent_process()
        parent_pid = os.getppid() if process is None else process.pid
    _prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signum)


def bind_forked_children() -> None:
    """From now on a child that a library forks off this process dies with it, and at a signal.

    Megatron's checkpoint writers are such children
    (megatron/core/dist_checkpointing/strategies/filesystem_async.py). Left alone they outlive a
    killed rank, and inherit the handlers and the pipe of `watch_signals` without its thread.
    """
    before_fork = threading.local()  # of the thread that forks: its process and its signal mask

    def block_signals() -> None:
        # A signal that reached the child before `bind_child` would go through the inherited
        # handler and pipe to the parent's watcher; blocked, it waits for the child.
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
    """Adopt orphaned descendants instead of leaving them to init, so that they can be found and
    ended.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def register_cleanup(cleanup: Callable[[], None]) -> None:
    """Run `cleanup` when a signal ends this process (see `watch_signals`); the last registered
    runs first.
    """
    _cleanups.append(cleanup)


def unregister_cleanup(cleanup: Callable[[], None]) -> None:
    """Forget a registered cleanup; one that is not registered is ignored."""
    with contextlib.suppress(ValueError):
        _cleanups.remove(cleanup)


def watch_signals(describe: Callable[[], str] | None) -> None:
    """From now on SIGINT and SIGTERM end this process at once, also while its main thread is
    blocked in C++.

    One line goes to stderr, `stopped by SIGTERM: <describe()>`, or none where `describe` is None;
    the registered cleanups get CLEANUP_SECONDS together; the exit code is 128 + signal. Call it
    once, from the main thread; `describe` runs in the watching thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for signum in _ENDING_SIGNALS:
        # The byte is written for signals that have a Python handler; the thread does the work.
        signal.signal(signum, _leave_to_the_watcher)
    threading.Thread(
        target=_end_on_signal, args=(reader, describe), name="signal-watcher", daemon=True
    ).start()


def is_ending() -> bool:
    """Whether a signal has come that ends this process: nothing new should be started."""
    return _ending.is_set()


def _leave_to_the_watcher(signum: int, frame: object) -> None:
    pass


def _end_on_signal(reader: int, describe: Callable[[], str] | None) -> None:
    for signum in _signals(reader):
        if signum not in _ENDING_SIGNALS:
            continue  # another handler of this process, told through the same pipe
        try:
            _ending.set()
            if describe is not None:
                _say(f"stopped by {signal.Signals(signum).name}: {describe()}")
            worker = threading.Thread(target=run_cleanups, name="cleanup", daemon=True)
            worker.start()
            worker.join(CLEANUP_SECONDS)
        finally:
            os._exit(128 + signum)


def _signals(reader: int) -> Iterator[int]:
    while received := os.read(reader, 64):
        yield from received


def run_cleanups() -> None:
    """Run what was registered, the last first; a cleanup that fails is told on stderr."""
    for cleanup in reversed(tuple(_cleanups)):  # other threads may register and forget meanwhile
        try:
            cleanup()
        except Exception as error:  # the others still have to run, and the process ends anyway
            _say(f"cleanup {cleanup!r} failed: {error!r}")


def _say(line: str) -> None:
    # Not sys.stderr: the main thread may hold its lock.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, (line + "\n").encode())
