"""Starts and ends `python -m megatron_rl.<command> CONFIG [key=value ...]` on every rank.

A rank ends together with its torchrun agent, and at once on SIGINT or SIGTERM. An error is reported
once, by the first rank that fails: on stderr, in `<run_dir>/error.txt`, and to the agent, whose own
failure report then ends with the same message. An error that the user can fix is one line, any
other one a traceback. The other ranks exit without a report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.config.file import load_config
from megatron_rl.errors import ConfigError, DataError, DivergenceError, EngineError, SyncError
from megatron_rl.process.lifetime import (
    bind_forked_children,
    die_with_parent,
    run_cleanups,
    watch_signals,
)

USER_ERRORS = (ConfigError, DataError, EngineError, SyncError, DivergenceError)
ERROR_FILE = "error.txt"
COLLECTIVE_ERRORS = ("RuntimeError", "DistBackendError")
LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited"
)
# The file in which torchrun looks for the error of a failed rank.
AGENT_VARIABLE = "TORCHELASTIC_ERROR_FILE"


class Progress:
    """The progress of a rank, for the message that is printed when a signal stops it.

    Example: `progress.describe = lambda: "in step 3, phase rollout"`.
    """

    def __init__(self) -> None:
        self.describe: Callable[[], str] = lambda: "before the first step"


def run_command(
    description: str, work: Callable[[Config, Progress], None], argv: list[str] | None = None
) -> int:
    """Parse the command line, do the work on this rank, and return the exit code 0.

    A process boundary: every exception, `BaseException` included, is reported and ends the process
    with exit code 1, without unwinding further.

    Args:
        description: of the command, for --help.
        work: called with the config and a `Progress`, in which it records its progress.
        argv: arguments of the command line; by default those of this process.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. loop.num_steps=50")
    arguments = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    bind_forked_children()
    progress = Progress()
    watch_signals((lambda: progress.describe()) if rank == 0 else None)
    _quiet_libraries()
    run_dir = None
    try:
        config = load_config(arguments.config, arguments.overrides)
        run_dir = Path(config.run_dir)
        if rank == 0:
            _delete_stale(run_dir / ERROR_FILE)
        work(config, progress)
    except BaseException as error:
        if lost := _lost_peer(error):
            _tell(f"rank {rank}: another rank ended in the middle of a collective: {lost}", run_dir)
        elif isinstance(error, USER_ERRORS):
            _tell(f"{type(error).__name__}: {error}", run_dir)
        else:
            _tell(f"rank {rank}:\n{traceback.format_exc()}", run_dir)
        _leave(1)
    return 0


def _lost_peer(error: BaseException | None) -> str:
    """The message of gloo or NCCL if the error comes from a rank that ended; otherwise ""."""
    while error is not None:
        # By exact class name: a broken connection to an engine is a subclass of RuntimeError.
        if type(error).__name__ in COLLECTIVE_ERRORS and LOST_PEER.search(str(error)):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return ""


def _leave(code: int) -> None:
    """End without waiting for the other ranks, which may be in a collective without this rank."""
    run_cleanups()
    sys.stdout.flush()
    os._exit(code)


def _tell(message: str, run_dir: Path | None) -> None:
    """Print the message and write it to the run's folder, unless another rank failed earlier."""
    is_first = _is_first()
    _tell_agent(message if is_first else "another rank failed first", is_first)
    if not is_first:
        return
    print(message, file=sys.stderr, flush=True)
    if run_dir is not None:
        with contextlib.suppress(OSError):  # the disk may be the cause; the message is on stderr
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / ERROR_FILE).write_text(message + "\n")


def _is_first() -> bool:
    """Whether this is the first rank of this launch on this host that fails."""
    if AGENT_VARIABLE not in os.environ:
        return True
    # <folder of the launch>/attempt_<n>/<local rank>/error.json
    marker = Path(os.environ[AGENT_VARIABLE]).parents[1] / "reported"
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        pass  # e.g. a full disk: reporting twice is better than not at all
    return True


def _tell_agent(message: str, is_first: bool) -> None:
    """Make torchrun's report end with the message instead of the advice to "enable traceback".

    The format is that of torch/distributed/elastic/multiprocessing/errors/error_handler.py.
    """
    if AGENT_VARIABLE not in os.environ:
        return
    # The agent reports the rank with the earliest timestamp, in whole seconds, as the cause.
    seconds = int(time.time()) + (0 if is_first else 1)
    extra = {"py_callstack": message, "timestamp": str(seconds)}
    with contextlib.suppress(OSError):
        Path(os.environ[AGENT_VARIABLE]).write_text(
            json.dumps({"message": {"message": message, "extraInfo": extra}})
        )


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
