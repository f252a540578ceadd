"""How a tool ends: what its user can mend is one line on standard error, and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from megatron_rl.errors import ConfigError, DataError, EngineError

BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE has ended


def run_tool(name: str, work: Callable[[], int | None], *, code: int = 1) -> int:
    """Do the work of a tool; returns its exit code.

    Args:
        name: of the tool, with which the line begins.
        work: returns the exit code; None: 0.
        code: of a failure that is told in one line. Other errors are faults of the tool, and pass.
    """
    try:
        return work() or 0
    except BrokenPipeError:  # as in `... | head`, whose reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ConfigError, DataError, EngineError) as error:
        told = str(error)
    except OSError as error:
        told = what_failed(error)
    print(f"{name}: {told}", file=sys.stderr)
    return code


def what_failed(error: OSError) -> str:
    """The paths and the reason of the system, without its number."""
    if error.strerror is None:
        return str(error)
    paths = " -> ".join(str(each) for each in (error.filename, error.filename2) if each is not None)
    return f"{paths}: {error.strerror}" if paths else error.strerror
