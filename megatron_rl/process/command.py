"""Starts and ends `python -m megatron_rl.<command> CONFIG [key=value ...]` on every rank.

A rank ends together with its torchrun agent, and at once on SIGINT or SIGTERM. An error is reported
once, by the first rank that fails: on stderr, in `error.txt` of the folder that the command holds,
and to the agent. An error that the user can fix is one line, to which `agent.py` adds nothing, and
with which torchrun's own failure report ends; any other error is a traceback. The other ranks exit
without a report.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_rl.config import Config
from megatron_rl.config.file import load_config
from megatron_rl.errors import (
    ConfigError,
    DataError,
    DivergenceError,
    EngineError,
    NothingToDo,
    RewardError,
    SyncError,
)
from megatron_rl.process.beats import Beats
from megatron_rl.process.folder import (
    AGENT_VARIABLE,
    check_temporary_folder,
    disk_problem,
    hold_folder,
    is_held_by_another,
)
from megatron_rl.process.lifetime import (
    bind_forked_children,
    die_with_parent,
    register_cleanup,
    run_cleanups,
    unregister_cleanup,
    watch_signals,
)
from megatron_rl.process.told import has_failed, is_first_to_fail, note_stop, tell_agent

USER_ERRORS = (ConfigError, DataError, EngineError, SyncError, DivergenceError, RewardError)
ERROR_FILE = "error.txt"
_ENDING = threading.Lock()  # held by the thread that ends this process
COLLECTIVE_ERRORS = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")
LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited"
)
# Of gloo and of torch's store, if a host cannot be reached any more.
SILENT_PEER = re.compile(
    r"Timed out waiting|timed out after|Connection timed out|No route to host"
    r"|Network is unreachable|timeout caused pair closure"
)


class Progress:
    """The progress of a rank, for the message that is printed when a signal stops it.

    Example: `progress.describe = lambda: "in step 3, phase rollout"`.
    """

    def __init__(self) -> None:
        self.describe: Callable[[], str] = lambda: "before the first step"
        # which other ranks have ended, are silent or are somewhere else; "" if nothing is known
        self.others: Callable[[], str] = lambda: ""
        # which other ranks of this host were killed; "" if none is known
        self.killed: Callable[[], str] = lambda: ""
        # whether the ranks have met: until then, another run may hold the folder
        self.has_met = False

    def meet(self, beats: Beats | None = None) -> None:
        """Note that the ranks have met, and how the others are watched."""
        self.has_met = True
        if beats is not None:
            self.others, self.killed = beats.others, beats.killed


def run_command(
    description: str,
    work: Callable[[Config, Progress], None],
    argv: list[str] | None = None,
    *,
    folder_of: Callable[[Config], Path] | None = None,
) -> int:
    """Parse the command line, do the work on this rank, and return the exit code 0.

    A process boundary: every exception, `BaseException` included, is reported and ends the process
    with exit code 1, without unwinding further.

    Args:
        description: of the command, for --help.
        work: called with the config and a `Progress`, in which it records its progress.
        argv: arguments of the command line; by default those of this process.
        folder_of: the folder, `run_dir` or one in it, that rank 0 holds until it ends, so that no
            other process writes it; None if the command writes none.
    """
    arguments = _parse(description, sys.argv[1:] if argv is None else argv)
    rank = int(os.environ.get("RANK", "0"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    bind_forked_children()
    progress = Progress()
    folder: Path | None = None
    watch_signals((lambda: _place_of_stop(progress, folder)) if rank == 0 else None)
    _quiet_libraries()
    threading.excepthook = lambda raised: _end_after_thread(raised, folder)

    def dump_stacks() -> None:
        if folder is not None and has_failed() and progress.has_met:
            _dump_stacks(folder, rank)

    try:
        config = load_config(arguments.config, arguments.overrides)
        check_temporary_folder()
        wanted = None if folder_of is None else folder_of(config)
        if rank == 0 and wanted is not None:
            hold_folder(wanted, f"run_dir={config.run_dir}")
            _delete_stale(wanted / ERROR_FILE)
        folder = wanted
        if folder is not None:
            # A rank that is told to end because another one failed says where it was.
            register_cleanup(dump_stacks)
        work(config, progress)
    except NothingToDo as end:
        if rank == 0:
            print(end, flush=True)
    except BaseException as error:
        unregister_cleanup(dump_stacks)
        is_of_peer = bool(_peer_error(error, LOST_PEER) or _peer_error(error, SILENT_PEER))
        others = progress.others() if is_of_peer else ""
        message = _message(error, rank, progress.describe(), others)
        if is_of_peer and folder is not None:
            message += f"; stacks in {_dump_stacks(folder, rank)}"
        # Of a rank that ended without a word only the agent's report says how.
        _end(message, folder, is_cause=not is_of_peer and _is_for_user(error))
    return 0


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, on the first rank."""

    def error(self, message: str) -> NoReturn:
        """Tell the message and how the command is used, and end."""
        usage = " ".join(self.format_usage().split())
        _tell(f"{self.prog}: {message}; {usage}", None, is_cause=True)
        self.exit(2)


def _parse(description: str, argv: list[str]) -> argparse.Namespace:
    parser = _Parser(description=description)
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. loop.num_steps=50"
    )
    for each in argv:
        if each.startswith("--") and "." in each:
            key, _, value = each.removeprefix("--").partition("=")
            parser.error(f"got {each}: settings have no dashes, write {key}={value or '...'}")
    return parser.parse_args(argv)


def _place_of_stop(progress: Progress, folder: Path | None) -> str:
    """Where the run is stopped. "" if a launcher ends this rank after the failure of another one:
    that one has told it, or was killed, which is told here.
    """
    if has_failed():
        return ""
    if folder is not None and (killed := progress.killed()):
        place, stacks = progress.describe(), _dump_stacks(folder, 0)
        message = f"rank 0: another rank ended ({place}): {killed}; stacks in {stacks}"
        _tell(message, folder, is_cause=False)
        return ""
    note_stop()
    return progress.describe()


def _is_for_user(error: BaseException) -> bool:
    """Whether the user is told of this error without a traceback."""
    return isinstance(error, USER_ERRORS) or bool(disk_problem(error))


def _message(error: BaseException, rank: int, place: str = "", others: str = "") -> str:
    """What the user is told: a line, or a traceback if it is nothing that the user can fix.

    Args:
        place: where the run is.
        others: which other ranks are missed.
    """
    blamed = f"; {others}" if others else ""
    if lost := _peer_error(error, LOST_PEER):
        where = f" ({place})" if place else ""
        return (
            f"rank {rank}: another rank ended in the middle of a collective{where}: {lost}{blamed}"
        )
    if silent := _peer_error(error, SILENT_PEER):
        return (
            f"rank {rank} on {socket.gethostname()}: expected every rank to take part in a "
            f"collective within parallel.timeout_seconds, another rank or its host does not answer "
            f"({place}): {silent}{blamed}"
        )
    if isinstance(error, USER_ERRORS):
        return f"{type(error).__name__}: {error}"
    if problem := disk_problem(error):
        return f"OSError: {problem}"
    return f"rank {rank}:\n{''.join(traceback.format_exception(error))}"


def _end_after_thread(raised: threading.ExceptHookArgs, folder: Path | None) -> None:
    """End the process after a disk error in a thread, such as that of TensorBoard's writer; report
    any other error of a thread as Python does.
    """
    error = raised.exc_value
    if error is None or not disk_problem(error):
        threading.__excepthook__(raised)
        return
    _end(_message(error, int(os.environ.get("RANK", "0"))), folder, is_cause=True)


def _peer_error(error: BaseException | None, pattern: re.Pattern[str]) -> str:
    """The message of gloo or NCCL if the error comes from another rank; otherwise ""."""
    while error is not None:
        # By exact class name: a broken connection to an engine is a subclass of RuntimeError.
        if type(error).__name__ in COLLECTIVE_ERRORS and pattern.search(str(error)):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return ""


def _dump_stacks(folder: Path, rank: int) -> Path:
    """Add the stacks of all threads of this rank to its file in the folder; the file."""
    path = folder / "logs" / f"stacks_of_rank_{rank}.txt"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            print(f"process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file)
            file.flush()
            faulthandler.dump_traceback(file)
    return path


def _end(message: str, folder: Path | None, *, is_cause: bool) -> None:
    """Tell the message and end, in the first thread that fails. A full disk fails several at once;
    the others wait here for the end.
    """
    with _ENDING:
        _tell(message, folder, is_cause=is_cause)
        _leave(1)


def _leave(code: int) -> None:
    """End without waiting for the other ranks, which may be in a collective without this rank."""
    run_cleanups()
    sys.stdout.flush()
    os._exit(code)


def _tell(message: str, folder: Path | None, *, is_cause: bool) -> None:
    """Print the message and write it to the folder, unless another rank failed earlier. A folder
    that another run holds remains as it is.

    Args:
        is_cause: whether the message says all that there is to say of the failure.
    """
    is_first = is_first_to_fail(message if is_cause else "")
    tell_agent(message if is_first else "another rank failed first", is_first=is_first)
    if not is_first:
        return
    print(message, file=sys.stderr, flush=True)
    if folder is not None and not is_held_by_another(folder):
        with contextlib.suppress(OSError):  # the disk may be the cause; the message is on stderr
            folder.mkdir(parents=True, exist_ok=True)
            _write_whole(folder / ERROR_FILE, message + "\n")


def _write_whole(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError:
        path.unlink(missing_ok=True)  # an empty message says less than none
        raise


def _delete_stale(error_file: Path) -> None:
    """Delete the error file of an earlier launch, but not one that a rank of this launch wrote."""
    agent_file = os.environ.get(AGENT_VARIABLE)
    with contextlib.suppress(FileNotFoundError):
        # The agent created this rank's folder just before it started the ranks.
        if agent_file is None or (
            error_file.stat().st_mtime < Path(agent_file).parent.stat().st_mtime
        ):
            error_file.unlink()


def _quiet_libraries() -> None:
    """Hide the libraries' notices about optional packages and future versions."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    for name in ("megatron", "httpx", "httpcore", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
