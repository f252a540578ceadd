"""How `python -m megatron_rl.<command> CONFIG [key=value ...]` starts and ends on every rank.

A rank dies with its torchrun agent, and ends at once on SIGINT or SIGTERM. An error that a user can
mend is told once, by the first rank that meets it, in one line and in `<run_dir>/error.txt`; every
other rank then just ends.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.config_file import load_config
from megatron_rl.errors import ConfigError, DataError, DivergenceError, EngineError, SyncError
from megatron_rl.lifetime import die_with_parent, watch_signals

USER_ERRORS = (ConfigError, DataError, EngineError, SyncError, DivergenceError)
ERROR_FILE = "error.txt"


class Progress:
    """Where the rank is, for the last words that a signal leaves."""

    def __init__(self) -> None:
        self.describe: Callable[[], str] = lambda: "before the first step"


def run_command(
    description: str, work: Callable[[Config, Progress], None], argv: list[str] | None = None
) -> int:
    """Parse the command line, do the work on this rank, return its exit code.

    Args:
        work: gets the config, and a `Progress` to say where it is.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. loop.num_steps=50")
    arguments = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    progress = Progress()
    if rank == 0:
        watch_signals(lambda: progress.describe())
    else:
        watch_signals(lambda: f"rank {rank}")
    _quiet_libraries()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:  # the same on every rank
        if rank == 0:
            print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    error_file = Path(config.run_dir) / ERROR_FILE
    if rank == 0:
        error_file.unlink(missing_ok=True)
    try:
        work(config, progress)
    except USER_ERRORS as error:
        if _is_first(error_file, f"{type(error).__name__}: {error}"):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        _leave(1)
    except BaseException:
        if _is_first(error_file, traceback.format_exc()):
            print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        _leave(1)
    return 0


def _leave(code: int) -> None:
    """End without waiting for the other ranks: they may stand in a collective that this one will
    never join.
    """
    from megatron_rl.lifetime import run_cleanups

    run_cleanups()
    sys.stdout.flush()
    os._exit(code)


def _is_first(error_file: Path, message: str) -> bool:
    """True on the first rank that fails; that rank's message is what error.txt says."""
    try:
        error_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(error_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    except OSError:
        return True  # the disk is part of the trouble: better twice than never
    with os.fdopen(descriptor, "w") as file:
        file.write(message + "\n")
    return True


def _quiet_libraries() -> None:
    """Only what concerns the user: libraries' notices about optional packages and future versions
    are not.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    for name in ("megatron", "httpx", "httpcore", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
